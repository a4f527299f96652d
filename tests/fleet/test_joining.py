"""Real embedded servers join and leave an open fleet; none answers before it has the fleet's weights."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.data.types import Group
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.fleet.registry import Registry
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet import test_faults
from tests.fleet.test_faults import PROMPTS, SAMPLING

pytestmark = pytest.mark.processes

TIMEOUTS = replace(test_faults.TIMEOUTS, start_timeout_seconds=240, probe_timeout_seconds=5)


class Site:
    """Embedded servers that register in a folder and outlive the fleet that uses them."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.registry = Registry(folder / "registry")
        self.registry.path.mkdir()
        self.servers: list[ServerProcess] = []

    def start(self, version: str = "0", *, register: bool = True) -> ServerProcess:
        number = len(self.servers)
        options = ["--weight-version", version]
        server = embedded_server(str(self.model), self.folder / f"{number}.log", options)
        server.start()
        self.servers.append(server)
        if register:
            self.registry.add(number, server.url)
        return server

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        assert all(not psutil.pid_exists(server.pid) for server in self.servers)


@pytest.fixture
def site(moe_folder: Path, tmp_path: Path) -> Iterator[Site]:
    with closing(Site(moe_folder, tmp_path)) as site:
        yield site


@pytest.fixture
def weights(moe_folder: Path) -> list[dict[str, Tensor]]:
    """Versions 0 to 3."""
    tensors = load_file(moe_folder / "model.safetensors")
    return [{name: tensor * (1 + k / 2) for name, tensor in tensors.items()} for k in range(4)]


def open_fleet(site: Site, *, keep: bool = True, batch: int = 8) -> Fleet:
    return Fleet.open(
        site.registry.urls(),
        TensorTransport(1 << 16),
        TIMEOUTS,
        registry=site.registry,
        sequences_per_request=batch,
        keep_weights=keep,
    )


def sampled(fleet: Fleet, version: int | None, step: int = 0) -> list[Group]:
    return fleet.generate(PROMPTS, 4, SAMPLING, seed=(0, step), weight_version=version)


def wait_for(fleet: Fleet, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(fleet.urls) != count:
        assert time.monotonic() < deadline, [(member.url, member.reason) for member in fleet.members]
        time.sleep(0.02)


def checksums(*urls: str) -> list[tuple[str, dict[str, str]]]:
    """Return the version and the checksums of each server."""

    async def of(url: str) -> tuple[str, dict[str, str]]:
        client = Client(url)
        try:
            return await client.version(), dict((await client.checksums())[1])
        finally:
            await client.close()

    with closing(LoopThread("checksums")) as thread:
        return [thread.call(of(url)) for url in urls]


def test_joiners_and_leavers_change_no_sample_of_a_synchronous_run(site: Site, weights) -> None:
    site.start()
    with open_fleet(site) as fleet:
        fleet.update(weights[1].items(), 1)
        expected = [sampled(fleet, 1, step) for step in range(3)]
        site.start("1")  # the weights of version 0, named as those that the fleet has
        assert sampled(fleet, 1, 0) == expected[0]
        wait_for(fleet, 2)
        assert len({str(entry) for entry in checksums(*fleet.urls)}) == 1
        assert sampled(fleet, 1, 1) == expected[1]
        remover = threading.Timer(0.2, lambda: site.registry.remove(0))
        remover.start()
        assert sampled(fleet, 1, 2) == expected[2]
        remover.join()
        wait_for(fleet, 1)
        fleet.update(weights[2].items(), 2)
        site.registry.add(0, site.servers[0].url)  # with version 1
        wait_for(fleet, 2)
        assert len({str(entry) for entry in checksums(*fleet.urls)}) == 1


def test_a_server_that_starts_during_pushes_and_requests_never_answers_with_old_weights(site: Site, weights) -> None:
    site.start()
    with open_fleet(site, keep=False, batch=1) as fleet:
        fleet.update(weights[0].items(), 0)
        pending = fleet.submit(PROMPTS, 4, SAMPLING, (0, 0), range(4))
        site.start("0")
        for version in (1, 2, 3):
            fleet.update(weights[version].items(), version)
            time.sleep(0.5)
        versions = {v for _, batch in pending for g in batch.result() for r in g.responses for v in r.weight_versions}
        assert {version for version, _, _ in versions} <= {0, 1, 2, 3}
        deadline = time.monotonic() + 200
        while not any(member.waits_for_push for member in fleet.members) and len(fleet.urls) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        fleet.update(weights[1].items(), 4)
        wait_for(fleet, 2)
        assert len({str(entry) for entry in checksums(*fleet.urls)}) == 1
        assert checksums(*fleet.urls)[0][0] == "4"


@pytest.mark.slow
def test_kills_of_joiners_and_servers_leave_one_version_and_no_process(site: Site, weights) -> None:
    """30 random kills: of a server that joins, or that has joined, at any time of steps of sampling and pushing."""
    choice = random.Random(0)
    site.start()
    with open_fleet(site) as fleet:
        fleet.update(weights[0].items(), 0)
        expected = [sampled(fleet, 0)]
        for version in (1, 2, 3):
            fleet.update(weights[version].items(), version)
            expected.append(sampled(fleet, version))
        fleet.update(weights[0].items(), 4)
        for kill in range(30):
            server = site.start(str(choice.randrange(5)))
            number = len(site.servers) - 1
            victim = threading.Timer(choice.uniform(0, 8), os.kill, (server.pid, signal.SIGKILL))
            victim.start()
            version = 5 + kill
            deadline = time.monotonic() + 9
            while time.monotonic() < deadline and victim.is_alive():
                fleet.update(weights[version % 4].items(), version)
                assert tokens(sampled(fleet, version)) == tokens(expected[version % 4])
            victim.join()
            site.registry.remove(number)
        wait_for(fleet, 1)


def tokens(groups: list[Group]) -> list[tuple[int, ...]]:
    return [tuple(response.output_ids.tolist()) for group in groups for response in group.responses]
