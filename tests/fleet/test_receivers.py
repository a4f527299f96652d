"""Receiver processes: the same samples as without them, whatever is killed, and nothing left behind."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.channel import MAX_INLINE_BYTES, Channel
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult
from megatron_rl.fleet.result_columns import decode_results, encode_results, request_from_json, request_to_json
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, garbage, serving, too_long
from tests.fleet.test_fleet import PROMPTS, SAMPLING, TIMEOUTS, sampled

pytestmark = pytest.mark.processes


def opened(*servers: FakeServer, receivers: int = 1) -> Fleet:
    urls, transport = [server.url for server in servers], TensorTransport(1 << 20)
    return Fleet.open(urls, transport, TIMEOUTS, sequences_per_server=16, receivers=receivers)


@pytest.fixture(scope="module")
def expected() -> list[Group]:
    with serving(FakeServer()) as (server,), opened(server, receivers=0) as fleet:
        return sampled(fleet)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail if a test leaves a process or a descriptor."""
    this = psutil.Process()
    children, descriptors = set(this.children(recursive=True)), this.num_fds()
    yield
    assert set(this.children(recursive=True)) == children
    assert this.num_fds() <= descriptors


def processes(fleet: Fleet) -> set[int]:
    found = {member.receiver for member in fleet.members}
    return {r.process.pid for r in found if r is not None and r.process is not None}


@pytest.mark.parametrize("receivers", [1, 2, 5])
def test_samples_do_not_depend_on_receivers(expected: list[Group], receivers: int) -> None:
    with serving(*(FakeServer() for _ in range(3))) as servers, opened(*servers, receivers=receivers) as fleet:
        assert sampled(fleet) == expected
        assert sampled(fleet, step=1) != expected
        assert len(processes(fleet)) == min(receivers, 3)


def test_a_killed_receiver_costs_no_sample_and_blames_no_server(expected: list[Group]) -> None:
    with serving(FakeServer(), FakeServer()) as servers, opened(*servers) as fleet:
        sampled(fleet)
        for server in servers:
            server.delay_seconds = 0.2
        [first] = processes(fleet)

        def kill() -> None:
            while not any(member.num_sequences for member in fleet.members):
                time.sleep(0.001)
            os.kill(first, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        assert sampled(fleet) == expected
        thread.join()
        assert processes(fleet) != {first}
        assert len(fleet.urls) == 2


def test_a_receiver_ends_with_its_connection() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "megatron_rl.fleet.receiver", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    ours.close()
    assert process.wait(60) == 0


def test_errors_of_servers_keep_their_meaning(expected: list[Group]) -> None:
    with serving(FakeServer(), FakeServer()) as (liar, good), opened(liar, good) as fleet:
        liar.trick = garbage
        assert sampled(fleet) == expected
        assert good.url in fleet.urls
        good.status, good.trick = 400, too_long
        with pytest.raises(RolloutError, match="the prompt is too long"):
            sampled(fleet)


def test_a_cancelled_request_leaves_the_receiver_usable() -> None:
    with serving(FakeServer()) as (server,), opened(server) as fleet:
        server.delay_seconds = 60
        pending = fleet.submit(PROMPTS[:1], 1, SAMPLING, (0, 0))
        deadline = time.monotonic() + 30
        while not server.calls["/generate"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _, future in pending:
            future.cancel()
        server.delay_seconds = 0
        assert fleet.generate(PROMPTS[:1], 1, SAMPLING, (0, 0))
        assert len(server.rows) == 1  # the first request did not reach its end


def result(tokens: int, *, routes: bool) -> GenerationResult:
    random = np.random.default_rng(tokens)
    ids, logprobs = random.integers(0, 1000, tokens).astype(np.int32), -random.random(tokens).astype(np.float32)
    found = random.integers(0, 256, (tokens + 2, 3, 2)).astype(np.uint8) if routes else None
    return GenerationResult(
        "a/b", ids, logprobs, logprobs[:1], "text", "stop", (("3", 0, tokens),), found, ((1, 2), ())
    )


def exchanged() -> tuple[list[GenerationResult], list[list[GenerationResult]]]:
    """Return results, and those of 20 messages with the first 0 to 3 of them."""
    results = [result(5, routes=True), result(0, routes=False), result(MAX_INLINE_BYTES, routes=True)]
    request = GenerationRequest("r", (1, 2), {"max_new_tokens": 3}, RouteShape((1, 2), 3, 8, 2), routes_start=1)

    async def exchange() -> list[list[GenerationResult]]:
        left, right = socket.socketpair()
        received: list[list[GenerationResult]] = []
        closed = asyncio.Event()

        def receive(message, data) -> None:
            received.append(decode_results(message["results"], data))
            assert request_from_json(message["request"]) == request
            if len(received) == 20:
                closed.set()

        sender = Channel(left, lambda message, data: None, lambda: None)
        receiver = Channel(right, receive, closed.set)
        for number in range(20):
            entries, columns = encode_results(results[: number % 4])
            sender.send({"results": entries, "request": request_to_json(request)}, columns)
        await closed.wait()
        sender.close()
        receiver.close()
        return received

    return results, asyncio.run(exchange())


def test_results_and_requests_travel_unchanged_however_large() -> None:
    results, received = exchanged()
    for number, found in enumerate(received):
        assert found == results[: number % 4]
        for one, other in zip(found, results, strict=False):
            assert (one.routes is None) == (other.routes is None)
            assert one.routes is None or np.array_equal(one.routes, np.asarray(other.routes))
            one.output_ids[:1] = 7  # may be written to


@pytest.mark.timeout(60)  # an answer that is lost is waited for without end
def test_full_shared_memory_is_one_message_and_loses_no_result(caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))  # the kernel refuses to write more to memory too
    try:
        results, received = exchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [found == results[: number % 4] for number, found in enumerate(received)] == [True] * 20
    [message] = [record.getMessage() for record in caplog.records if record.name == "megatron_rl.fleet.channel"]
    assert message.startswith("No shared memory for ")
    assert "nothing is lost" in message


def test_a_receiver_does_not_need_torch() -> None:
    script = "import sys, megatron_rl.fleet.receiver; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
