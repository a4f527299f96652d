"""Weights through shared memory against real servers, also when either side is killed in the middle."""

import asyncio
import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import aiohttp
import pytest
import torch

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.weights.checksum import sha256
from megatron_rl.weights.ipc import IpcTransport
from megatron_rl.weights.shared_memory import (
    CannotShare,
    MemoryHandle,
    MemoryLocation,
    SharedBuffer,
    can_share_memory,
    open_shared,
)
from megatron_rl.weights.transport import UpdateReport
from tests.inference_server import tiny
from tests.weights.test_distributed import healthy, weights

CPU = torch.device("cpu")
MARK = "megatron-rl-weights"
pytestmark = [pytest.mark.processes, pytest.mark.skipif(not can_share_memory(), reason="no memfd and /proc here")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    process = embedded_server(str(model), tmp_path / "log", environment={"OMP_NUM_THREADS": "1"})
    try:
        process.start()
        asyncio.run(healthy([process]))
        yield process
    finally:
        process.stop()


def shared_by(pid: int) -> list[str]:
    """Return the shared buffers that a process or its children hold, mapped or as files."""
    found: list[str] = []
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for number in (pid, *map(int, children)):
        found += [line for line in Path(f"/proc/{number}/maps").read_text().splitlines() if MARK in line]
        for entry in Path(f"/proc/{number}/fd").iterdir():
            try:
                found += [os.readlink(entry)] if MARK in os.readlink(entry) else []
            except FileNotFoundError:  # the listing itself
                continue
    return found


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def pushed(servers: list[ServerProcess], transport: IpcTransport, version: int) -> UpdateReport:
    clients = [Client(process.url) for process in servers]
    report = await transport.push(clients, weights(servers), version)
    for client in clients:
        await client.close()
    return report


@pytest.mark.parametrize("bucket_bytes", [100, 1 << 12, 1 << 24])
def test_every_tensor_arrives_whatever_the_size_of_the_buffer(server: ServerProcess, bucket_bytes: int) -> None:
    async def sums() -> tuple[str, dict[str, str], str]:
        client = Client(server.url)
        algorithm, found = await client.checksums()
        version = await client.version()
        await client.close()
        return algorithm, dict(found), version

    report = asyncio.run(pushed([server], IpcTransport(bucket_bytes, CPU), 7))
    assert not report.failed, report.failed
    assert asyncio.run(sums()) == ("sha256", {name: sha256(tensor) for name, tensor in weights([server])}, "7")
    assert shared_by(server.pid) == shared_by(os.getpid()) == []


def test_the_sender_may_send_another_type_than_it_has(server: ServerProcess) -> None:
    transport = IpcTransport(1 << 12, CPU)
    transport.dtype = torch.bfloat16
    report = asyncio.run(pushed([server], transport, 1))
    assert "if it serves another dtype than the trainer's" in str(report.failed[server.url])


def test_a_server_that_is_killed_leaves_nothing_behind(server: ServerProcess) -> None:
    async def run() -> UpdateReport:
        client = Client(server.url)
        transport = IpcTransport(1 << 12, CPU)
        update = await transport.begin([client], 2)
        for number, bucket in enumerate(transport.buckets(weights([server]))):
            if number == 1:
                assert shared_by(server.pid)
                os.kill(server.pid, signal.SIGKILL)
            await update.send(bucket)
        report = await update.finish()
        await client.close()
        return report

    report = asyncio.run(run())
    assert set(report.failed) == {server.url}
    assert shared_by(os.getpid()) == []


SENDER = """
import asyncio, sys, time, torch
from megatron_rl.fleet.client import Client
from megatron_rl.weights.ipc import IpcTransport

async def main():
    update = await IpcTransport(1 << 12, torch.device("cpu")).begin([Client(sys.argv[1])], 2)
    await update.send([("model.norm.weight", torch.ones(32))])
    assert not update.failed, update.failed
    print("sent", flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def test_a_sender_that_is_killed_leaves_nothing_behind(server: ServerProcess) -> None:
    before = set(os.listdir("/dev/shm"))
    sender = subprocess.Popen([sys.executable, "-c", SENDER, server.url], stdout=subprocess.PIPE, text=True)
    try:
        assert sender.stdout is not None
        assert sender.stdout.readline() == "sent\n"
        assert shared_by(server.pid)
        assert set(os.listdir("/dev/shm")) <= before  # it has no name anywhere
        sender.kill()
        sender.wait()
        wait_until(lambda: not shared_by(server.pid))
    finally:
        sender.kill()
        sender.wait()
    # What it sent was never used, and the next sender is served.
    assert not asyncio.run(pushed([server], IpcTransport(1 << 12, CPU), 3)).failed


class Elsewhere(Client):
    """A client whose server says that it runs somewhere else."""

    def __init__(self, url: str, location: MemoryLocation | None) -> None:
        super().__init__(url)
        self._location = location

    async def memory_location(self) -> MemoryLocation | None:
        return self._location


@pytest.mark.parametrize(
    ("location", "why"),
    [
        (dataclasses.replace(MemoryLocation.current(), boot_id="other"), "another machine"),
        (dataclasses.replace(MemoryLocation.current(), pid_namespace="other"), "another container"),
        (dataclasses.replace(MemoryLocation.current(), user=12345), "another user"),
        (dataclasses.replace(MemoryLocation.current(), boot_id=""), "needs Linux"),
        (None, "only the embedded server"),
    ],
)
def test_a_server_elsewhere_is_refused_in_words(location: MemoryLocation | None, why: str) -> None:
    report = asyncio.run(IpcTransport(1 << 12, CPU).push([Elsewhere("http://10.0.0.7:1", location)], [], 1))
    [error] = report.failed.values()
    assert why in str(error)
    assert "weights.carrier = ipc" in str(error)
    assert "write tensor, disk, distributed or auto" in str(error)


def test_the_memory_is_its_owners_alone_and_cannot_be_guessed() -> None:
    shared = SharedBuffer(100, CPU)
    handle = shared.handle()
    assert isinstance(handle, MemoryHandle)
    shared.memory.copy_(torch.arange(100))
    assert torch.equal(open_shared(handle), shared.memory)
    assert stat.S_IMODE(os.stat(f"/proc/{handle.pid}/fd/{handle.fd}").st_mode) == 0o600
    theirs = open_shared(handle)
    theirs[0] = 77  # a reader's copy
    assert int(shared.memory[0]) == 0
    with pytest.raises(CannotShare, match="another token"):
        open_shared(dataclasses.replace(handle, token="00" * 32))
    with pytest.raises(CannotShare, match="does not have 101 bytes"):
        open_shared(dataclasses.replace(handle, num_bytes=101))
    with pytest.raises(CannotShare, match="is not shared memory for weights"):
        open_shared(dataclasses.replace(handle, fd=0))
    with pytest.raises(CannotShare, match="processes of one user on one machine"):
        open_shared(dataclasses.replace(handle, fd=10_000))
    shared.close()
    with pytest.raises(CannotShare):
        open_shared(handle)


async def answer_to(server: ServerProcess, entry: Mapping[str, object], begun: bool = True) -> str:
    """Return what the server has against this slice of a shared buffer."""
    shared = SharedBuffer(128, CPU)
    await ask(server, "/begin_weight_update", {})
    if not begun:
        await ask(server, "/end_weight_update", {})
    body = {"handle": dataclasses.asdict(shared.handle()), "slices": [entry]}
    return await ask(server, "/update_weights_from_handle", body)


async def ask(server: ServerProcess, path: str, body: Mapping[str, object]) -> str:
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        assert response.status in (200, 400)
        return "" if response.status == 200 else (await response.json())["message"]


GOOD = {"name": "model.norm.weight", "dtype": "float32", "shape": [32], "start": 0, "num_bytes": 128, "offset": 0}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"offset": 4}, "is not in the buffer"),
        ({"offset": -1}, "is not in the buffer"),
        ({"start": 4}, "does not follow byte 0"),
        ({"num_bytes": -1}, "is not in the buffer"),
        ({"shape": [-32]}, "model.norm.weight is float32"),
        ({"dtype": "object"}, "send one of float64"),
        ({"name": "nobody's"}, "unknown tensor"),
        ({"more": 1}, "slices.0.more"),
    ],
)
def test_a_server_believes_nothing_that_a_sender_says(server_once: ServerProcess, change, why: str) -> None:
    found = asyncio.run(answer_to(server_once, {**GOOD, **change}))
    assert why in found
    assert bool(found) == bool(why)


@pytest.fixture(scope="module")
def server_once(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = embedded_server(str(model), tmp_path_factory.mktemp("once") / "log")
    try:
        process.start()
        asyncio.run(healthy([process]))
        yield process
    finally:
        process.stop()


def test_a_slice_without_an_update_is_refused(server_once: ServerProcess) -> None:
    assert "begin_weight_update" in asyncio.run(answer_to(server_once, GOOD, begun=False))
