"""What only the embedded server does; the protocol that it shares with others is in tests/contract."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from megatron_rl.fleet.background import LoopThread
from megatron_rl.inference_server.access import AccessRules
from megatron_rl.inference_server.engine import Engine
from megatron_rl.inference_server.requests import BadRequest, parse_request
from megatron_rl.inference_server.server import EmbeddedServer
from tests.inference_server.tiny import running

pytestmark = pytest.mark.processes

DEMO_MODEL = Path(__file__).parents[2] / "configs" / "demo-model"


@contextmanager
def served(folder: Path, access: AccessRules | None = None, poll_seconds: float = 1.0) -> Iterator[tuple[Engine, str]]:
    """Run a server in this process."""
    thread = LoopThread("server")
    with running(folder) as engine:
        rules = access or AccessRules()
        app = EmbeddedServer(engine, rules).application()
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        idle: list[asyncio.Task[None]] = []  # cancelled when the thread closes

        async def start() -> str:
            await runner.setup()
            assert runner.server is not None
            idle.append(asyncio.create_task(rules.close_idle_connections(runner.server, poll_seconds)))
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return "http://{}:{}".format(*runner.addresses[0])

        try:
            yield engine, thread.call(start())
        finally:
            thread.call(runner.cleanup())
            thread.close()


def ask(url: str, body: dict[str, Any], timeout_seconds: float = 30) -> tuple[int, Any]:
    async def post() -> tuple[int, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=body) as response:
            return response.status, json.loads(await response.text())

    return asyncio.run(post())


def test_rows_of_a_client_that_went_away_are_not_decoded_to_their_end(moe_folder: Path) -> None:
    with served(moe_folder) as (engine, url):
        body = {"input_ids": [[1, 2]] * 400, "sampling_params": {"max_new_tokens": 250}}
        with pytest.raises(TimeoutError):
            ask(f"{url}/generate", body, timeout_seconds=0.2)
        begin = time.monotonic()
        assert ask(f"{url}/generate", {"input_ids": [3], "sampling_params": {"max_new_tokens": 2}})[0] == 200
        assert time.monotonic() - begin < 1
        assert not engine.batch


def test_a_server_whose_engine_failed_says_so(moe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", print)  # the failure is wanted: pytest would warn of it
    with served(moe_folder) as (engine, url):
        ended = threading.Event()
        engine.on_end = ended.set
        engine.call(lambda: setattr(engine, "batch", "broken"))
        assert ended.wait(10)
        status, answer = ask(f"{url}/generate", {"input_ids": [3]})
        assert (status, answer["error"]["message"]) == (503, "the engine has stopped; its log says why")


def test_text_is_that_of_the_tokenizer_without_the_stop() -> None:
    with served(DEMO_MODEL) as (engine, url):
        tokenizer = engine.model.tokenizer
        assert tokenizer is not None
        prompt = tokenizer("7+5*3-2=")["input_ids"]
        params = {"max_new_tokens": 30, "temperature": 0}
        _, whole = ask(f"{url}/generate", {"input_ids": prompt, "sampling_params": params})
        assert whole["meta_info"]["finish_reason"]["type"] == "stop"
        assert whole["output_ids"][-1] in engine.model.eos_ids
        assert whole["text"] == tokenizer.decode(whole["output_ids"][:-1])
        stop = whole["text"][-2:]
        _, cut = ask(f"{url}/generate", {"input_ids": prompt, "sampling_params": {**params, "stop": [stop, "never"]}})
        assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert cut["text"] == whole["text"].partition(stop)[0]
        assert tokenizer.decode(cut["output_ids"]).endswith(stop)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"input_ids": [1], "smapling_params": {}}, "smapling_params"),
        ({"input_ids": [1], "sampling_params": {"frequency_penalty": 0.5}}, r"sampling_params.*frequency_penalty"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 2.5}}, "max_new_tokens"),
        ({"input_ids": [1], "sampling_params": {"stop": ["a", ""]}}, "stop"),
        ({"text": "hello"}, "input_ids"),
        ({"input_ids": [[1], []]}, "a prompt is empty"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid: 1 entries for 2 prompts"),
        ({"input_ids": [[1], [2]], "stream": True}, "one sequence per request"),
    ],
)
def test_unknown_or_wrong_fields_are_refused_by_name(body: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        parse_request(json.dumps(body).encode())


def test_seeds_of_any_64_bits_are_taken(moe_folder: Path) -> None:
    with served(moe_folder) as (_, url):
        for seed in (-(1 << 63), (1 << 63) - 1):
            body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2, "sampling_seed": seed, "n": 2}}
            assert ask(f"{url}/generate", body)[0] == 200
        body["sampling_params"]["sampling_seed"] = 1 << 63
        assert ask(f"{url}/generate", body)[0] == 400


def test_many_streams_cost_less_than_twice_the_work_of_plain_answers(moe_folder: Path) -> None:
    async def cpu_seconds(url: str, stream: bool) -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(number: int) -> None:
                params = {"max_new_tokens": 16, "ignore_eos": True}
                body = {"input_ids": [1 + number % 40, 2], "sampling_params": params, "stream": stream}
                async with session.post(f"{url}/generate", json=body) as answer:
                    assert answer.status == 200
                    assert (b"[DONE]" in await answer.read()) == stream

            begin = time.process_time()  # of server and clients: other programs do not change it
            await asyncio.gather(*(one(number) for number in range(500)))
            return time.process_time() - begin

    with served(moe_folder) as (engine, url):
        engine.batching = "continuous"
        asyncio.run(cpu_seconds(url, stream=False))  # the first requests are slower
        ratios = [
            asyncio.run(cpu_seconds(url, stream=True)) / asyncio.run(cpu_seconds(url, stream=False)) for _ in range(3)
        ]
    assert min(ratios) < 2, ratios
