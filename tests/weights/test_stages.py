"""Pushes by stages against real embedded servers, of which some die, hang, refuse or come late."""

import asyncio
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.rollout.stage_push import StageClients
from megatron_rl.weights.checksum import SUM64, sums64
from megatron_rl.weights.stage_sender import StageResult, StageSender
from megatron_rl.weights.stages import StageTransport
from megatron_rl.weights.transport import UpdateReport, WeightReceiver, send_buckets
from tests.inference_server import tiny

pytestmark = pytest.mark.processes

TIMEOUT_SECONDS = 6.0
BUCKET_BYTES = 1 << 12
Weights = dict[str, Tensor]
BeforeBucket = Callable[[int, int], None]
"""Called before a bucket is sent, with the index of the stage and of its bucket."""


class GroupClient(Client):
    """A client of a server that receives no streams, as SGLang."""

    async def receiver(self) -> WeightReceiver:
        return replace(await super().receiver(), is_streamed=False)


@dataclass
class Trainer:
    """The senders of all stages, each in a thread of its own, as ranks are processes of their own."""

    stages: list[StageTransport]
    loops: list[LoopThread]
    client: type[Client]

    @classmethod
    def of(cls, stages: int, client: type[Client]) -> "Trainer":
        """Return a trainer with so many pipeline stages."""
        made = []
        for index in range(stages):
            sender = StageSender(
                StageClients(client, TIMEOUT_SECONDS), "gloo", torch.device("cpu"), TIMEOUT_SECONDS, index
            )
            made.append(StageTransport(BUCKET_BYTES, sender))
        return cls(made, [LoopThread("stage") for _ in made], client)

    def push(
        self, urls: Sequence[str], weights: Weights, version: int, before: BeforeBucket = lambda *_: None
    ) -> UpdateReport:
        """Push weights, of which every stage has its part."""
        main, loop = self.stages[0], self.loops[0]
        clients = [self.client(url, None, TIMEOUT_SECONDS) for url in urls]
        update = loop.call(main.begin(clients, version))
        plan, barrier = main.plan, Barrier(len(self.stages))

        def send(index: int) -> StageResult:
            stage = self.stages[index]
            if index:
                stage.sender.begin(plan)
            part = sorted(weights.items())[index :: len(self.stages)]

            def buckets() -> Iterator[list[tuple[str, Tensor]]]:
                for number, bucket in enumerate(stage.buckets(part)):
                    before(index, number)
                    yield bucket

            barrier.wait()
            send_buckets(self.loops[index].start, stage.send, buckets(), stage.in_flight)
            return stage.sender.result

        with ThreadPoolExecutor(len(self.stages)) as pool:
            # Servers that handle one request at a time get one stage after the other.
            results = list(pool.map(send, range(len(self.stages))))
        main.exchange = lambda _: results
        main.join(update)
        report = loop.call(update.finish())
        for client in clients:
            loop.call(client.close())
        return report


@pytest.fixture(params=[Client, GroupClient], ids=["streams", "group"])
def client(request: pytest.FixtureRequest) -> type[Client]:
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    logs, environment = tmp_path_factory.mktemp("logs"), {"OMP_NUM_THREADS": "1"}
    made = [embedded_server(str(model), logs / str(number), environment=environment) for number in range(3)]
    try:
        yield made
    finally:
        for process in made:
            process.stop()


@pytest.fixture
def servers(pool: list[ServerProcess]) -> Iterator[list[ServerProcess]]:
    """Three servers that run; those that a test has killed are started again for the next one."""
    ended = [process for process in pool if not is_running(process)]
    for process in ended:
        process.start()
    for process in ended:
        asyncio.run(healthy(process))
    yield pool
    for process in pool:
        if process.exit_status is None:
            os.kill(process.pid, signal.SIGCONT)


def is_running(process: ServerProcess) -> bool:
    try:
        return bool(process.pid) and process.exit_status is None
    except AssertionError:  # it was never started
        return False


async def healthy(process: ServerProcess) -> None:
    member = Member(Client(process.url), process)
    await wait_until_healthy(member, Timeouts(start_timeout_seconds=120))
    await member.client.close()


def weights_of(model: Path, number: int) -> Weights:
    return {name: tensor + number for name, tensor in load_file(model / "model.safetensors").items()}


async def state_of(url: str) -> tuple[str, Mapping[str, str]]:
    client = Client(url)
    version, (algorithm, sums) = await client.version(), await client.checksums(SUM64)
    await client.close()
    assert algorithm == SUM64
    return version, sums


def assert_has(url: str, weights: Weights, version: str) -> None:
    """Every tensor of the server is that of the trainer, and so is the version."""
    found, sums = asyncio.run(state_of(url))
    assert found == version
    assert sums == sums64(weights)


@pytest.mark.parametrize("stages", [1, 2])
def test_every_server_gets_every_tensor_of_every_stage(
    servers: list[ServerProcess], model: Path, client: type[Client], stages: int
) -> None:
    trainer, urls = Trainer.of(stages, client), [server.url for server in servers]
    weights = weights_of(model, 1)
    total = sum(tensor.nbytes for tensor in weights.values())
    report = trainer.push(urls[:1], weights, 1)
    assert (report.failed, report.num_bytes, report.num_tensors) == ({}, total, len(weights))
    assert_has(urls[0], weights, "1")

    joined = trainer.push(urls[:2], weights, 2)  # the second one has none of it
    assert (joined.failed, joined.num_bytes) == ({}, total)
    for url in urls[:2]:
        assert_has(url, weights, "2")

    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    changed = trainer.push(urls[:2], weights, 3)  # what has not changed is compared, but not sent
    assert changed.failed == {}
    assert (changed.num_bytes, changed.num_tensors) == (weights["lm_head.weight"].nbytes, len(weights))
    for url in urls[:2]:
        assert_has(url, weights, "3")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_dropped_and_the_others_have_the_weights(
    servers: list[ServerProcess], model: Path, client: type[Client], number: int
) -> None:
    victim = 1  # neither the first nor the last one
    trainer, urls = Trainer.of(2, client), [server.url for server in servers]
    assert trainer.push(urls, weights_of(model, 1), 1).failed == {}

    def before(stage: int, bucket: int) -> None:
        if (stage, bucket) == (1, 2):
            os.kill(servers[victim].pid, number)

    report = trainer.push(urls, weights_of(model, 2), 2, before)

    assert set(report.failed) == {urls[victim]}
    for url in set(urls) - {urls[victim]}:
        assert_has(url, weights_of(model, 2), "2")
    if number == signal.SIGSTOP:
        os.kill(servers[victim].pid, signal.SIGCONT)
        assert_has(urls[victim], weights_of(model, 1), "1")  # it applied nothing
        assert trainer.push(urls, weights_of(model, 3), 3).failed == {}
        assert_has(urls[victim], weights_of(model, 3), "3")


def test_a_server_that_refuses_a_bucket_is_dropped_and_passes_on_what_it_gets(
    servers: list[ServerProcess], model: Path, client: type[Client], tmp_path: Path
) -> None:
    other = embedded_server(str(tiny.save("qwen3_moe", tmp_path / "other", head_dim=16)), tmp_path / "log")
    other.start()
    try:
        asyncio.run(healthy(other))
        urls = [servers[0].url, other.url, servers[1].url]
        report = Trainer.of(2, client).push(urls, weights_of(model, 1), 1)
    finally:
        other.stop()
    assert set(report.failed) == {other.url}
    assert "has shape" in str(report.failed[other.url])
    for server in servers[:2]:
        assert_has(server.url, weights_of(model, 1), "1")


def push_and_die(urls: Sequence[str], model: Path, client: type[Client]) -> None:
    """Push, and end this process like a crash in the middle."""

    def before(stage: int, bucket: int) -> None:
        if (stage, bucket) == (0, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.of(2, client).push(urls, weights_of(model, 2), 2, before)


def test_servers_keep_their_weights_if_the_sender_is_killed(
    servers: list[ServerProcess], model: Path, client: type[Client]
) -> None:
    urls = [server.url for server in servers]
    assert Trainer.of(1, client).push(urls, weights_of(model, 1), 1).failed == {}
    sender = multiprocessing.get_context("spawn").Process(target=push_and_die, args=(urls, model, client))
    sender.start()
    sender.join()
    assert sender.exitcode == -signal.SIGKILL
    for url in urls:
        assert_has(url, weights_of(model, 1), "1")
    assert Trainer.of(2, client).push(urls, weights_of(model, 3), 3).failed == {}
    for url in urls:
        assert_has(url, weights_of(model, 3), "3")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 15))])
def test_random_kills_leave_no_server_with_mixed_weights(
    servers: list[ServerProcess], model: Path, client: type[Client], seed: int
) -> None:
    numbers, trainer = random.Random(seed), Trainer.of(2, client)
    urls = [server.url for server in servers]
    for version, victim in enumerate(numbers.sample(range(3), 2), start=1):
        moment = numbers.randrange(2), numbers.randrange(6)

        def before(stage: int, bucket: int, victim: int = victim, moment: tuple[int, int] = moment) -> None:
            if (stage, bucket) == moment:
                os.kill(servers[victim].pid, signal.SIGKILL)

        report = trainer.push(urls, weights_of(model, version), version, before)
        assert set(report.failed) == {servers[victim].url}
        urls.remove(servers[victim].url)
        for url in urls:
            assert_has(url, weights_of(model, version), str(version))
