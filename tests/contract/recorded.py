"""Answers of the real SGLang, recorded once and replayed where it is not installed.

    record:  python -m tests.contract.recorded     needs the environment that tools/sglang-cpu makes
    replay:  tests/contract/test_recorded.py

Both hold the same conversation: once through a proxy that writes down what the server answers, then with a server that
gives those answers again and checks that the client still asks the same.
"""

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp import web
from safetensors.torch import load_file

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult, RequestRefused
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import UpdateReport
from tests.inference_server import tiny

FILE = Path(__file__).with_name("recorded.json")
KEPT = ("version", "device", "weight_version", "dtype", "max_total_num_tokens")
"""What is kept of /server_info, which is long and full of paths."""


@dataclass
class Heard:
    """What the client made of the answers."""

    samples: list[GenerationResult]
    scores: list[GenerationResult]
    after: list[GenerationResult]
    report: UpdateReport
    version: str
    refusal: str


async def conversation(client: Client) -> Heard:
    """Ask for all that a run asks for."""
    drawn = {"max_new_tokens": 5, "temperature": 0.7, "stop_token_ids": [7], "sampling_seed": 3}
    requests = [GenerationRequest(f"1.0/p/{i}", (3, 1, 4, i), drawn) for i in range(4)]
    scores = [GenerationRequest(f"score/{i}", (2, 7, 1, i), {"max_new_tokens": 0}) for i in (0, tiny.VOCABULARY - 1)]
    await client.set_version("0")
    samples, scored = await client.generate(requests, "0"), await client.generate(scores)
    refusal = ""
    try:
        await client.generate([GenerationRequest("long", (1,) * 300, drawn)])
    except RequestRefused as error:
        refusal = str(error)
    await client.pause("retract")
    report = await TensorTransport(1 << 14).push([client], weights().items(), 1)
    await client.flush()
    await client.resume()
    after = await client.generate(requests, "1")
    return Heard(samples, scored, after, report, await client.version(), refusal)


def weights() -> dict[str, torch.Tensor]:
    """Return tensors for the model, the same whatever made the random ones."""
    with tempfile.TemporaryDirectory() as folder:
        saved = load_file(tiny.save("qwen3_moe", Path(folder)) / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in saved.items()}
    return {
        name: ((torch.arange(shape.numel()) % 7 - 3) / 8).reshape(shape) + (1 if "norm" in name else 0)
        for name, shape in shapes.items()
    }


@dataclass
class Tape:
    """Everything that was answered, in order."""

    upstream: str = ""
    entries: list[dict[str, Any]] = field(default_factory=list)

    async def record(self, request: web.Request) -> web.Response:
        """Pass a request on and write down the answer."""
        body = await request.read()
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, self.upstream + request.path, data=body, headers=_JSON) as answer,
        ):
            text = await answer.text()
        entry = {"path": request.path, "asked": _asked(body), "status": answer.status}
        if request.path == "/server_info":
            text = json.dumps({key: value for key, value in json.loads(text).items() if key in KEPT})
        try:
            entry["answer"] = json.loads(text)
        except ValueError:
            entry["text"] = text
        if isinstance(entry.get("answer"), dict):
            entry["answer"] = {k: v for k, v in entry["answer"].items() if not k.endswith(("_path", "_model_name"))}
        self.entries.append(entry)
        return web.Response(status=answer.status, text=text)

    async def replay(self, request: web.Request) -> web.Response:
        """Answer what was answered then."""
        entry = self.entries.pop(0)
        asked = {"path": request.path, "asked": _asked(await request.read())}
        if asked != {key: entry[key] for key in asked}:
            return web.Response(status=400, text=f"asked {asked}, recorded {entry['path']}: {entry['asked']}")
        return web.Response(status=entry["status"], text=entry.get("text") or json.dumps(entry["answer"]))


_JSON = {"Content-Type": "application/json"}


def _asked(body: bytes) -> Mapping[str, object]:
    asked = json.loads(body or b"{}")
    return {key: "..." if key == "serialized_named_tensors" else value for key, value in asked.items()}


async def hold(handler: Any) -> Heard:
    """Hold the conversation with a server of this handler."""
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = Client("http://{}:{}".format(*runner.addresses[0][:2]))
    try:
        return await conversation(client)
    finally:
        await client.close()
        await runner.cleanup()


def main() -> None:
    from tests.contract.conftest import start

    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save("qwen3_moe", Path(folder) / "model")
        tiny.tokenizer().save_pretrained(model)
        process = start("sglang", model, Path(folder) / "log")
        try:
            asyncio.run(_record(process.url))
        finally:
            process.stop()


async def _record(url: str) -> None:
    client = Client(url)
    await wait_until_healthy(Member(client), Timeouts())
    await client.close()
    tape = Tape(url)
    await hold(tape.record)
    FILE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in tape.entries) + "\n]\n")


if __name__ == "__main__":
    main()
