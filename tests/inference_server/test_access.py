"""Requests that no trainer sends: from web pages, without the key, too slow, too large, or made of noise.

``FUZZ_REQUESTS=100000 python -m pytest -s -m slow tests/inference_server/test_access.py`` runs the long fuzz; FUZZ_SEED
gives other requests. It prints the counts of each status (0: no answer within 5 s) and the slowest /health in ms (-1).
"""

import asyncio
import base64
import io
import json
import logging
import os
import pickle
import random
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.protocol import API_KEY, Endpoint
from megatron_rl.inference_server import access
from megatron_rl.inference_server.access import AccessRules, warn_if_public
from tests.inference_server.test_server import ask, served

pytestmark = pytest.mark.processes

GENERATE = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}


def status_of(
    url: str, headers: dict[str, str], body: bytes = json.dumps(GENERATE).encode(), method: str = "POST"
) -> int:
    async def send() -> int:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, data=body, headers=headers) as answer,
        ):
            await answer.read()
            return answer.status

    return asyncio.run(send())


JSON = {"Content-Type": "application/json"}


def test_requests_of_web_pages_are_refused(moe_folder: Path) -> None:
    with served(moe_folder) as (_, url):
        generate = url + Endpoint.GENERATE
        assert status_of(generate, JSON) == 200
        assert status_of(generate, {**JSON, "Host": "localhost:30000"}) == 200
        assert status_of(generate, {**JSON, "Host": socket.gethostname()}) == 200
        assert status_of(generate, {**JSON, "Origin": "http://evil.example"}) == 403
        assert status_of(generate, {**JSON, "Origin": "null"}) == 403
        assert status_of(generate, {**JSON, "Host": "evil.example"}) == 403
        assert status_of(generate, {**JSON, "Host": "evil.example:30000"}) == 403
        assert status_of(generate, {"Content-Type": "text/plain"}) == 415
        assert status_of(generate, {"Content-Type": "application/x-www-form-urlencoded"}) == 415


def test_a_server_with_a_key_answers_only_those_who_have_it(moe_folder: Path) -> None:
    with served(moe_folder, AccessRules("s3cret")) as (_, url):
        generate, key = url + Endpoint.GENERATE, {"Authorization": "Bearer s3cret"}
        assert status_of(generate, {**JSON, **key}) == 200
        assert status_of(generate, JSON) == 401
        for wrong in ("s3cret", "Bearer s3cre", "Bearer ", "Basic s3cret"):
            assert status_of(generate, {**JSON, "Authorization": wrong}) == 401
        assert status_of(url + Endpoint.MODEL_INFO, {}, b"", "GET") == 401
        assert status_of(url + Endpoint.HEALTH, {}, b"", "GET") == 200


def test_the_trainer_sends_the_key_of_its_environment(moe_folder: Path, monkeypatch) -> None:
    async def version(url: str) -> str:
        client = Client(url)
        try:
            return await client.version()
        finally:
            await client.close()

    with served(moe_folder, AccessRules("s3cret")) as (_, url):
        monkeypatch.setenv(API_KEY, "s3cret")
        assert asyncio.run(version(url)) == "0"
        monkeypatch.delenv(API_KEY)
        with pytest.raises(RolloutError, match="401"):
            asyncio.run(version(url))


@pytest.mark.parametrize(("host", "key", "warns"), [
    ("127.0.0.1", "", False), ("::1", "", False), ("localhost", "", False), ("0.0.0.0", "x", False),
    ("0.0.0.0", "", True), ("::", "", True), ("10.0.0.1", "", True), ("node1", "", True),
])  # fmt: skip
def test_a_server_that_other_machines_reach_warns(caplog, host: str, key: str, warns: bool) -> None:
    with caplog.at_level(logging.WARNING):
        warn_if_public(host, key)
    assert bool(caplog.records) == warns


def test_a_body_that_does_not_arrive_or_is_too_large_is_refused(moe_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(access, "MAX_BODY_BYTES", 1000)
    with served(moe_folder) as (_, url):
        assert status_of(url + Endpoint.GENERATE, JSON, b" " * 1001) == 413
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = ("POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9")
            connection.sendall("\r\n".join([*head, "", ""]).encode())
            assert b" 408 " in connection.recv(100)


def test_connections_that_send_nothing_are_closed(moe_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(access, "FIRST_REQUEST_SECONDS", 0.1)
    rules = AccessRules()
    with served(moe_folder, rules, poll_seconds=0.05) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
        slow = socket.create_connection((host, int(port)), timeout=30)
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        assert [connection.recv(1) for connection in [*silent, slow]] == [b""] * 21
        for connection in [*silent, slow]:
            connection.close()


@pytest.mark.parametrize("params", [
    {"top_k": 1 << 63}, {"stop_token_ids": [1e30]}, {"stop_token_ids": [-1]}, {"n": 10**6, "max_new_tokens": 0},
    {"max_new_tokens": 1 << 63}, {"temperature": 1e300}, {"stop": [""]}, {"stop": "x" * 2000},
    {"sampling_seed": 1 << 63},
])  # fmt: skip
def test_values_out_of_bounds_are_refused(moe_folder: Path, params: dict[str, Any]) -> None:
    with served(moe_folder) as (engine, url):
        status, _ = ask(url + Endpoint.GENERATE, {"input_ids": [1, 2], "sampling_params": params})
        assert status == 400
        assert engine.is_alive()


def test_a_start_beyond_the_prompt_is_refused(moe_folder: Path) -> None:
    with served(moe_folder) as (_, url):
        body = {**GENERATE, "return_logprob": True, "logprob_start_len": 3}
        assert ask(url + Endpoint.GENERATE, body)[0] == 400


def test_weights_that_are_not_finite_or_no_floats_change_nothing(moe_folder: Path, tmp_path: Path) -> None:
    with served(moe_folder) as (engine, url):
        name, tensor = next(iter(engine.model.tensors.items()))
        before = tensor.clone()
        wrong = [torch.full(before.shape, value) for value in (float("nan"), float("inf"), -float("inf"))]
        wrong += [before.to(kind) for kind in (torch.int64, torch.bool, torch.complex64, torch.uint8)]
        for number, value in enumerate(wrong):
            save_file({name: value}, tmp_path / "x.safetensors")
            assert ask(url + Endpoint.UPDATE_FROM_DISK, {"model_path": str(tmp_path)})[0] == 400, number
            assert torch.equal(tensor, before)
        assert ask(url + Endpoint.GENERATE, GENERATE)[0] == 200


def test_paths_that_are_no_weights_are_refused(moe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder" / "x.safetensors").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "x.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.safetensors").touch()
    paths = [str(tmp_path / name) for name in ("folder", "pipe", "pipe/x.safetensors", "empty", "none", "x" * 300)]
    with served(moe_folder) as (_, url):
        for path in [*paths, "x" * 100_000, "a\0b", "/dev/zero", "/proc/self/mem", ""]:
            assert ask(url + Endpoint.UPDATE_FROM_DISK, {"model_path": path})[0] == 400, path[:100]
        assert ask(url + Endpoint.GENERATE, GENERATE)[0] == 200


def test_huge_shapes_are_refused_before_memory_is_allocated(moe_folder: Path) -> None:
    with served(moe_folder) as (engine, _):
        reader = access_reader(engine)
        for shape in ([1 << 40], [1 << 20, 1 << 20], [1 << 62, 4], [10**30]):
            with pytest.raises(ValueError, match="no tensor of this model is as large"):
                reader._empty(entry(shape))


def access_reader(engine: Any) -> Any:
    from megatron_rl.inference_server.shared_buffers import SharedBufferReader

    return SharedBufferReader(engine.model.device, 1 << 20)


def entry(shape: list[int]) -> Any:
    from megatron_rl.weights.shared_memory import TensorSlice

    return TensorSlice("x", "float32", tuple(shape), 0, 4, 0)


# ---- noise ----

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 47, 48, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 10**30, 10**400),
    *(
        0.0,
        0.5,
        -0.5,
        1e30,
        1e308,
        -1e-308,
        "",
        "x",
        "\ud83d",
        "\0",
        "x" * 5000,
        "../..",
        "/dev/null",
        "abort",
        "\u202e",
    ),
    *([], [[]], {}, [1, 2], [[1, 2]], [[1], [2, 3]], [0] * 300, ["x"], [None], {"a": 1}, [1e30], [-1], [[[1]]]),
]
FIELDS = [
    *("input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "stream", "return_routed_experts"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos"),
    *("skip_special_tokens", "sampling_seed", "mode", "model_path", "weight_version", "new_version", "abort_all"),
    *("serialized_named_tensors", "names", "dtypes", "shapes", "group_name", "handle", "slices", "action", "algorithm"),
    *("torch_empty_cache", "selector", "load_format", "flush_cache", "abort_message", "abort_all_requests", "unknown"),
]
PATHS = [path for path in Endpoint if path not in (Endpoint.PAUSE, Endpoint.JOIN_GROUP)]
"""A paused server answers nothing until it continues; joining a group waits for the other side."""


def noise(generator: random.Random) -> tuple[str, str, bytes]:
    """Return method, path and body of a random request: half of them are nearly valid."""
    path = generator.choice(PATHS) if generator.random() < 0.6 else Endpoint.GENERATE
    method = generator.choice(["POST"] * 8 + ["GET", "PUT"])
    body: dict[str, Any] = {}
    if path == Endpoint.GENERATE:
        body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": generator.randrange(4)}}
        parameters = body["sampling_params"]
        for _ in range(generator.randrange(3)):
            parameters[generator.choice(FIELDS[7:18])] = generator.choice(VALUES)
    elif path == Endpoint.UPDATE_FROM_TENSOR:
        buffer = io.BytesIO()
        pickle.dump([("x", generator.choice(VALUES[:30]))], buffer)
        raw = bytearray(buffer.getvalue())
        for _ in range(generator.randrange(4)):
            raw[generator.randrange(len(raw))] = generator.randrange(256)
        body = {"serialized_named_tensors": [base64.b64encode(raw).decode()]}
    for _ in range(generator.randrange(3)):
        body[generator.choice(FIELDS)] = generator.choice(VALUES)
    return method, path, damaged(json.dumps(body), generator)


def damaged(text: str, generator: random.Random) -> bytes:
    """Return the body, in a third of the cases cut, nested, replaced or with a changed byte."""
    kinds = {
        0: lambda: text[: generator.randrange(len(text) + 1)],
        1: lambda: "[" * generator.choice([10, 1000, 100_000]),
        2: lambda: json.dumps(generator.choice(VALUES)),
        3: lambda: text.replace("1", generator.choice(["NaN", "Infinity", "1" * 5000, "1e999", "-0", "01"])),
    }
    data = bytearray(kinds.get(generator.randrange(12), lambda: text)().encode())
    if data and generator.random() < 0.1:
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data)


async def send_noise(url: str, seed: int, count: int) -> dict[int, int]:
    """Send random requests, a few at a time; return how often each status was answered."""
    generator, statuses = random.Random(seed), dict[int, int]()
    timeout = aiohttp.ClientTimeout(total=5)
    slots = asyncio.Semaphore(8)

    async def one(session: aiohttp.ClientSession, method: str, path: str, body: bytes) -> None:
        async with slots:
            try:
                async with session.request(method, url + path, data=body, headers=JSON) as answer:
                    await answer.read()
                    status = answer.status
            except TimeoutError:
                status = 0  # a long generation; the server aborts it when the client leaves
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500, (method, path, body[:500])

    async with aiohttp.ClientSession(timeout=timeout) as session:
        for start in range(0, count, 100):
            requests = [noise(generator) for _ in range(min(100, count - start))]
            await asyncio.gather(*(one(session, *request) for request in requests))
            begin = time.monotonic()
            async with session.get(url + Endpoint.HEALTH) as answer:
                assert answer.status == 200
            statuses[-1] = max(statuses.get(-1, 0), round(1000 * (time.monotonic() - begin)))
    return statuses


def fuzz(folder: Path, seed: int, count: int) -> dict[int, int]:
    with served(folder) as (engine, url):
        statuses = asyncio.run(send_noise(url, seed, count))
        assert engine.is_alive()
        assert ask(url + Endpoint.GENERATE, GENERATE)[0] == 200
    return statuses


def test_noise_does_not_stop_the_server(moe_folder: Path) -> None:
    statuses = fuzz(moe_folder, seed=0, count=400)
    assert statuses[200] > 20
    assert statuses[400] > 100


@pytest.mark.slow
def test_much_noise_does_not_stop_the_server(moe_folder: Path) -> None:
    seed, count = (
        int(os.environ.get(name, default)) for name, default in (("FUZZ_SEED", "1"), ("FUZZ_REQUESTS", "100000"))
    )
    statuses = fuzz(moe_folder, seed, count)
    print(f"seed {seed}, {count} requests: {dict(sorted(statuses.items()))}")
    assert statuses[-1] < 1000  # ms: /health must not hang
