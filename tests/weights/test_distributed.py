"""The distributed transport against real servers that die or hang at the worst moment."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.weights.distributed import DistributedTransport
from megatron_rl.weights.transport import UpdateReport
from tests.inference_server import tiny

pytestmark = pytest.mark.processes

TIMEOUT_SECONDS = 4.0
TRANSPORT = DistributedTransport(1 << 12, "gloo", torch.device("cpu"), TIMEOUT_SECONDS)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    model = tiny.save("qwen3_moe", tmp_path / "model")
    started = [embedded_server(str(model), tmp_path / f"log{n}", environment={"OMP_NUM_THREADS": "1"}) for n in (0, 1)]
    try:
        for process in started:
            process.start()
        asyncio.run(healthy(started))
        yield started
    finally:
        for process in started:
            if process.exit_status is None:
                os.kill(process.pid, signal.SIGCONT)
            process.stop()


async def healthy(servers: list[ServerProcess]) -> None:
    for process in servers:
        member = Member(Client(process.url), process)
        await wait_until_healthy(member, Timeouts(start_timeout_seconds=120))
        await member.client.close()


def weights(servers: list[ServerProcess]) -> list[tuple[str, Tensor]]:
    folder = Path(servers[0].command[3])
    return [(name, tensor + 1) for name, tensor in sorted(load_file(folder / "model.safetensors").items())]


async def push_while(servers: list[ServerProcess], number: int) -> tuple[UpdateReport, float]:
    """Push; after the first bucket the first server gets this signal."""
    clients = [Client(process.url, control_timeout_seconds=TIMEOUT_SECONDS) for process in servers]
    begun = time.monotonic()
    update = await TRANSPORT.begin(clients, 5)
    for index, bucket in enumerate(TRANSPORT.buckets(weights(servers))):
        if index == 1:
            os.kill(servers[0].pid, number)
        await update.send(bucket)
    report = await update.finish()
    for client in clients:
        await client.close()
    return report, time.monotonic() - begun


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_dropped_and_the_other_has_the_weights(
    servers: list[ServerProcess], number: int
) -> None:
    report, seconds = asyncio.run(push_while(servers, number))

    assert set(report.failed) == {servers[0].url}
    # The timeout once, not once a bucket.
    assert seconds < (1 if number == signal.SIGKILL else 2) * TIMEOUT_SECONDS + 4

    async def version() -> str:
        client = Client(servers[1].url)
        found = await client.version()
        await client.close()
        return found

    assert asyncio.run(version()) == "5"
