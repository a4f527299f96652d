"""The fleet with real embedded servers that are killed, stopped and started again."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config.rollout import Sampling
from megatron_rl.data.types import Group, Prompt
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import embedded_server
from megatron_rl.weights.disk import DiskTransport
from megatron_rl.weights.tensor import TensorTransport
from tests.inference_server.tiny import prompts_of

pytestmark = pytest.mark.processes

TIMEOUTS = Timeouts(
    request_timeout_seconds=60,
    control_timeout_seconds=20,
    start_timeout_seconds=90,
    probe_seconds=0.1,
    probe_timeout_seconds=0.5,
    probe_failures=2,
)
PROMPTS = [Prompt(f"p{i}", tuple(ids), "", "") for i, ids in enumerate(prompts_of(*range(3, 19)))]
SAMPLING = Sampling(max_new_tokens=60)


@pytest.fixture(scope="module")
def fleet(moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    logs = tmp_path_factory.mktemp("logs")
    servers = [embedded_server(str(moe_folder), logs / f"{i}.log", ["--weight-version", "0"]) for i in range(2)]
    with Fleet.open(servers, TensorTransport(1 << 16), TIMEOUTS, sequences_per_request=8) as fleet:
        yield fleet
    assert all(not psutil.pid_exists(server.pid) for server in servers)


def sampled(fleet: Fleet, version: int, step: int = 0) -> list[Group]:
    return fleet.generate(PROMPTS, 4, SAMPLING, seed=(0, step), weight_version=version)


def tokens(groups: list[Group]) -> list[tuple[int, ...]]:
    return [tuple(response.output_ids.tolist()) for group in groups for response in group.responses]


def whole(fleet: Fleet, seconds: float = 60) -> None:
    """Wait until all servers are back."""
    deadline = time.monotonic() + seconds
    while len(fleet.urls) < len(fleet.members):
        assert time.monotonic() < deadline, [member.reason for member in fleet.members]
        time.sleep(0.05)


def hit_in_the_middle(fleet: Fleet, number: signal.Signals) -> threading.Thread:
    """Send a signal to the first server as soon as it works on a request."""
    victim = fleet.members[0]
    assert victim.process is not None
    pid = victim.process.pid

    def hit() -> None:
        while not victim.num_sequences:
            time.sleep(0.001)
        time.sleep(0.03)
        os.kill(pid, number)

    thread = threading.Thread(target=hit)
    thread.start()
    return thread


def test_same_call_same_bits(fleet: Fleet) -> None:
    assert sampled(fleet, 0) == sampled(fleet, 0)
    assert tokens(sampled(fleet, 0)) != tokens(sampled(fleet, 0, step=1))


def test_new_weights_change_the_samples_by_either_transport(fleet: Fleet, moe_folder: Path, tmp_path: Path) -> None:
    old = load_file(moe_folder / "model.safetensors")
    before = sampled(fleet, 0)
    report = fleet.update(((name, tensor * 1.5) for name, tensor in old.items()), 1)
    assert not report.failed
    changed = sampled(fleet, 1)
    assert tokens(changed) != tokens(before)
    transport, fleet.sync.transport = fleet.sync.transport, DiskTransport(1 << 16, tmp_path / "weights", moe_folder)
    fleet.update(old.items(), 2)
    fleet.sync.transport = transport
    assert tokens(sampled(fleet, 2)) == tokens(before)


def test_scores_are_the_logprobs_of_sampled_tokens(fleet: Fleet) -> None:
    group = sampled(fleet, 2)[0]
    sequences = [(*group.prompt.input_ids, *response.output_ids.tolist()) for response in group.responses]
    for scores, response in zip(fleet.score(sequences, 2), group.responses, strict=True):
        ours = scores[len(group.prompt.input_ids) - 1 :]
        assert ours == pytest.approx(response.logprobs, abs=1e-5)


def test_a_killed_server_costs_no_sample_and_comes_back_with_the_weights(fleet: Fleet) -> None:
    expected = sampled(fleet, 2)
    thread = hit_in_the_middle(fleet, signal.SIGKILL)
    assert sampled(fleet, 2) == expected
    thread.join()
    whole(fleet)
    assert sampled(fleet, 2) == expected
    assert fleet.members[0].version == "2"


def test_a_stopped_server_costs_no_sample_and_no_timeout(fleet: Fleet) -> None:
    expected = sampled(fleet, 2)
    assert fleet.members[0].process is not None
    thread = hit_in_the_middle(fleet, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        assert sampled(fleet, 2) == expected
    finally:
        thread.join()
        os.kill(fleet.members[0].process.pid, signal.SIGCONT)
    assert time.monotonic() - begin < 20
    whole(fleet)


def test_a_server_that_is_ten_times_slower_costs_no_sample(fleet: Fleet) -> None:
    expected = sampled(fleet, 2)
    slow = fleet.members[0].process
    assert slow is not None
    finished = threading.Event()

    def brake() -> None:  # one part in ten of its time
        while not finished.wait(0.005):
            os.kill(slow.pid, signal.SIGSTOP)
            time.sleep(0.045)
            os.kill(slow.pid, signal.SIGCONT)

    thread = threading.Thread(target=brake)
    thread.start()
    try:
        assert sampled(fleet, 2) == expected
    finally:
        finished.set()
        thread.join()
    assert slow.exit_status is None


def test_a_server_killed_in_a_push_loses_nothing_and_leaves_the_others_alone(fleet: Fleet, moe_folder: Path) -> None:
    long = Sampling(max_new_tokens=150)
    pending = fleet.submit(PROMPTS, 4, long, (0, 77), range(2, 4))
    while not all(member.num_sequences for member in fleet.members):
        time.sleep(0.001)
    victim = fleet.members[1].process
    assert victim is not None
    old = load_file(moe_folder / "model.safetensors")

    def deadly() -> Iterator[tuple[str, Tensor]]:
        for i, (name, tensor) in enumerate(old.items()):
            if i == len(old) // 2:
                os.kill(victim.pid, signal.SIGKILL)
            yield name, tensor * 1.1

    assert fleet.update(deadly(), 3).failed.keys() == {victim.url}
    responses = [r for _, chunk in pending for group in chunk.result(60) for r in group.responses]
    assert len({r.id for r in responses}) == len(responses) == 4 * len(PROMPTS)
    assert all(len(r.logprobs) == 150 for r in responses)
    assert {v for r in responses for v, _, _ in r.weight_versions} <= {2, 3}
    assert len(sampled(fleet, 3)) == len(PROMPTS)  # its way back is test_a_killed_server and, faster, test_fleet
