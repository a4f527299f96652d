"""Ingest of inference servers' answers: tokens per second, stalls of other threads, and use of slots.

    python benchmarks/ingest.py

All ratios compare with transcriptions of the code before receivers: ``json.loads``, loops over tokens, base64 to int32,
sorted rows, 256 sequences per request. Processor time, so that other load on the machine changes it little.
"""

import asyncio
import base64
import heapq
import json
import math
import mmap
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from aiohttp import web

from megatron_rl.data.routes import RouteShape, encode_routes
from megatron_rl.fleet.channel import Channel, Message
from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.protocol import GenerationRequest, parse_answer
from megatron_rl.fleet.receivers import MALLOC_VARIABLES
from megatron_rl.fleet.result_columns import encode_results
from megatron_rl.util.garbage import freeze_startup_objects

LAYERS, EXPERTS, PER_TOKEN = 60, 256, 8
SHAPE = RouteShape(tuple(range(LAYERS)), LAYERS, EXPERTS, PER_TOKEN)
RANK_OBJECTS = 471_000
"""Objects of torch, transformers and megatron-core in a rank's process, which the garbage collector visits."""
STALL_TOKENS = 4_200_000
"""About 200 MB."""


def body(tokens: int, *, routes: bool) -> tuple[bytes, GenerationRequest]:
    """Return an answer in SGLang's format, and its request."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 150_000, tokens).tolist()
    logprobs = (-random.exponential(1.0, tokens)).astype(np.float32).astype(float).tolist()
    meta: dict[str, object] = {
        "id": "r",
        "finish_reason": {"type": "length", "length": tokens},
        "completion_tokens": tokens,
        "weight_versions": [{"version": "3", "start": 0, "end": tokens}],
        "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)],
    }
    if routes:
        some = np.argsort(random.random((64, LAYERS, EXPERTS)), axis=-1)[..., :PER_TOKEN]
        meta["routed_experts"] = encode_routes(np.tile(some, (tokens // 64 + 1, 1, 1))[:tokens])
    answer = [{"text": "word " * tokens, "output_ids": ids, "meta_info": meta}]
    request = GenerationRequest("r", (1,), {"max_new_tokens": tokens}, SHAPE if routes else None)
    return json.dumps(answer, separators=(",", ":")).encode(), request


def parse_slowly(raw: bytes, request: GenerationRequest) -> tuple[tuple[int, ...], tuple[float, ...], object]:
    """Validate an answer as it was done before, token by token."""
    [entry] = json.loads(raw)
    meta, ids = entry["meta_info"], tuple(entry["output_ids"])
    assert all(type(i) is int and i >= 0 for i in ids)
    values = []
    for row, token in zip(meta["output_token_logprobs"], ids, strict=True):
        value: object = None
        if isinstance(row, list) and len(row) >= 2 and row[1] in (token, None):
            value = row[0]
        assert isinstance(value, int | float)
        assert math.isfinite(value)
        assert value <= 1e-3
        values.append(float(value))
    if request.routes is None:
        return ids, tuple(values), None
    raw_routes = base64.b64decode(meta["routed_experts"], validate=True)
    all_TAK = np.frombuffer(raw_routes, dtype="<i4").reshape(len(ids), LAYERS, PER_TOKEN)
    routes_TLK = all_TAK[:, list(SHAPE.layers)]
    assert 0 <= routes_TLK.min() <= routes_TLK.max() < EXPERTS
    ordered_TLK = np.sort(routes_TLK, axis=-1)
    assert not (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any()
    return ids, tuple(values), routes_TLK.astype(np.uint8)


def tokens_per_second(call: Callable[[], object], tokens: int, repeats: int = 7) -> float:
    """Return the tokens per second of processor time, best of several."""
    best = math.inf
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return tokens / best


def compare(routes: bool, queue: object) -> None:
    """Report the tokens per second of the code before and of today's, in a process like a receiver."""
    tokens = 4000 if routes else 20_000
    raw, request = body(tokens, routes=routes)
    heap = [[number] for number in range(RANK_OBJECTS)]
    old = tokens_per_second(lambda: parse_slowly(raw, request), tokens)
    heap.clear()
    freeze_startup_objects()
    queue.put((old, tokens_per_second(lambda: parse_answer(raw, [request], "here"), tokens)))  # type: ignore[attr-defined]


def worker(routes: bool, barrier: object, queue: object, seconds: float) -> None:
    """Parse for some seconds beside other processes; report tokens per second of processor time."""
    freeze_startup_objects()
    tokens = 4000 if routes else 20_000
    raw, request = body(tokens, routes=routes)
    parse_answer(raw, [request], "here")
    barrier.wait()  # type: ignore[attr-defined]
    end, begin, done = time.monotonic() + seconds, time.process_time(), 0
    while time.monotonic() < end:
        parse_answer(raw, [request], "here")
        done += tokens
    queue.put(done / (time.process_time() - begin))  # type: ignore[attr-defined]


def together(processes: int, *, routes: bool) -> float:
    """Return the tokens per second of several processes together, each with a core of its own."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    started = [context.Process(target=worker, args=(routes, barrier, queue, 3.0)) for _ in range(processes)]
    for process in started:
        process.start()
    total = sum(queue.get() for _ in started)
    for process in started:
        process.join()
    return total


def longest_stall(work: Callable[[], object]) -> float:
    """Return the longest time, in seconds, that another thread could not run while ``work`` did.

    The time in which that thread waited for a processor, because of other load on the machine, is left out.
    """
    finished, gaps = threading.Event(), [0.0]

    def tick() -> None:
        waits = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        last, last_wait = time.perf_counter(), float(waits.read_text().split()[1])
        while not finished.is_set():
            time.sleep(0.0005)
            now, wait = time.perf_counter(), float(waits.read_text().split()[1])
            gaps.append(now - last - (wait - last_wait) / 1e9)
            last, last_wait = now, wait

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.2)
    gaps[:] = [0.0]
    work()
    finished.set()
    thread.join()
    return max(gaps)


def serve(path: str, ready: object) -> None:
    """Serve a file as the answer to every generation request."""
    raw = Path(path).read_bytes()

    async def generate(_request: web.Request) -> web.Response:
        return web.Response(body=raw, content_type="application/json")

    app = web.Application(client_max_size=0)
    app.router.add_post("/generate", generate)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.put(listener.getsockname()[1])  # type: ignore[attr-defined]
    web.run_app(app, sock=listener, print=None)


def control(connection: socket.socket, url: str, request: GenerationRequest) -> None:
    """Sample like the controller: receive an answer, and send its columns over the connection."""

    async def receive() -> None:
        closed = asyncio.Event()
        channel = Channel(connection, lambda message, data: None, closed.set)
        client = HttpClient(url)
        entries, columns = encode_results(await client.generate([request]))
        channel.send({"results": entries}, columns)
        await client.close()
        await closed.wait()

    asyncio.run(receive())


async def receive_columns(connection: socket.socket) -> None:
    """Receive the columns of an answer like the main rank."""
    received = asyncio.Event()

    def keep(message: Message, data: bytearray | mmap.mmap) -> None:
        assert np.frombuffer(data, np.uint8)[::4096].any()  # reads every page
        received.set()

    channel = Channel(connection, keep, lambda: None)
    await received.wait()
    channel.close()


def stalls() -> tuple[float, float, float, int]:
    """Return the longest stalls in seconds (200 MB parsed here, by a controller, nothing done) and the bytes."""
    raw, request = body(STALL_TOKENS, routes=False)
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "body"
        path.write_bytes(raw)
        ready = context.Queue()
        server = context.Process(target=serve, args=(str(path), ready))
        server.start()
        url = f"http://127.0.0.1:{ready.get()}"
        received: list[float] = []
        for _ in range(3):
            ours, theirs = socket.socketpair()
            controller = context.Process(target=control, args=(theirs, url, request))
            controller.start()
            theirs.close()
            received.append(longest_stall(lambda ours=ours: asyncio.run(receive_columns(ours))))
            controller.join()
        server.terminate()
        server.join()
    at_rest = min(longest_stall(lambda: time.sleep(5)) for _ in range(3))
    return longest_stall(lambda: json.loads(raw)), min(received), at_rest, len(raw)


def sampling_time(lengths: np.ndarray, servers: int, slots: int, per_request: int, requests_per_server: int) -> float:
    """Return the time, in tokens of one sequence, until all responses are done.

    A server works on so many requests at a time; a request occupies the slots of its sequences until the longest ends.
    """
    busy = [0.0] * (servers * min(requests_per_server, slots // per_request))
    for start in range(0, len(lengths), per_request):
        begin = heapq.heappop(busy)
        heapq.heappush(busy, begin + float(lengths[start : start + per_request].max()))
    return max(busy)


def main() -> None:
    """Measure and print everything."""
    os.environ.update(MALLOC_VARIABLES)
    context = multiprocessing.get_context("spawn")
    for routes in (False, True):
        queue = context.Queue()
        process = context.Process(target=compare, args=(routes, queue))
        process.start()
        old, new = queue.get()
        process.join()
        one, two = together(1, routes=routes), together(2, routes=routes)
        name = f"with routes of {LAYERS} x {PER_TOKEN}" if routes else "without routes"
        print(f"{name}: {new:,.0f} tokens/s, {old:,.0f} before: x{new / old:.1f}; 2 processes: x{two / one:.2f} of one")
    before, now, idle, size = stalls()
    print(f"stall by {size / 1e6:.0f} MB: {before:.2f} s before, {now * 1e3:.1f} ms; at rest {idle * 1e3:.1f} ms")
    # Sequences start in order, as soon as a slot is free: with equal servers that is what the fleet does.
    lengths = np.minimum(np.random.default_rng(0).lognormal(8.0, 1.0, 16_384), 32_768)
    best = max(lengths.sum() / (16 * 512), lengths.max())
    for name, per_request, requests in (("256 per request, 2 requests", 256, 2), ("one per request", 1, 512)):
        used = sampling_time(lengths, 16, 512, per_request, requests)
        print(f"16,384 responses, 16 servers of 512 slots, {name}: {used / best:.2f} of the lower bound")
    longest_first = sampling_time(np.sort(lengths)[::-1], 16, 512, 1, 512)
    print(f"the same, longest first, if lengths were known: {longest_first / best:.2f} of the lower bound")


if __name__ == "__main__":
    main()
