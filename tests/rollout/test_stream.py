"""The bounded lag as a property: a fleet without a clock makes tokens in any order, and lies; nothing breaks the bound.

The same stream against real servers is tests/e2e/test_async.py.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.load import load
from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.data.prompts import Generated
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.rollout.buffer import NO_SIGNAL, SURPLUS, TOO_OLD, TRAINED, Buffer, StepBatch
from megatron_rl.rollout.records import ledger_lines
from megatron_rl.rollout.stream import Sampled, Stream, Verified
from megatron_rl.tasks.base import Verdict
from megatron_rl.weights.tensor import TensorTransport
from tests.fleet.fake import FakeServer, serving


@dataclass
class Making:
    """Groups of one request, token by token."""

    future: Sampled
    prompts: Sequence[Prompt]
    seed: tuple[int, ...]
    wanted: list[int]
    made: list[list[int]] = field(default_factory=list)
    """Weight versions of the tokens of each response so far."""

    def groups(self, size: int) -> list[Group]:
        name = ".".join(map(str, self.seed))
        responses = [
            Response(
                f"{name}/{self.prompts[i // size].id}/{i % size}",
                self.prompts[i // size].id,
                i % size,
                np.array(tuple(range(len(versions)))),
                np.array((-0.5,) * len(versions)),
                "",
                "stop",
                tuple((version, at, at + 1) for at, version in enumerate(versions)),
            )
            for i, versions in enumerate(self.made)
        ]
        return [Group(prompt, tuple(responses[i * size : (i + 1) * size])) for i, prompt in enumerate(self.prompts)]


class FakeFleet:
    """Makes a token of some response whenever it is told to work; may say that old weights made one."""

    def __init__(self, random: Random, version: int, lies: float) -> None:
        self.random, self.version, self.lies = random, version, lies
        self.making: list[Making] = []
        self.most = 0
        self.asked: Counter[str] = Counter()

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: Sequence[int],
        weight_versions: range | None = None,
        *,
        indices: Collection[int] | None = None,
        routes: RouteShape | None = None,
    ) -> list[tuple[int, Sampled]]:
        assert weight_versions is not None
        assert self.version in weight_versions
        pending = []
        for first in range(0, len(prompts), 2):  # two groups in a request
            part = prompts[first : first + 2]
            if indices is not None and not {first, first + 1} & set(indices):
                continue
            self.asked.update(prompt.id for prompt in part)
            lengths = [self.random.choice([1, 2, 3, 12]) for _ in range(len(part) * group_size)]
            making = Making(Future(), part, tuple(seed), lengths, [[] for _ in lengths])
            self.making.append(making)
            pending.append((first, making.future))
        self.most = max(self.most, sum(len(making.prompts) for making in self.making))
        return pending

    def work(self) -> None:
        making = self.random.choice(self.making)
        open_ = [i for i, wanted in enumerate(making.wanted) if len(making.made[i]) < wanted]
        lie = self.random.random() < self.lies
        making.made[self.random.choice(open_)].append(max(0, self.version - 3) if lie else self.version)
        if all(len(made) == wanted for made, wanted in zip(making.made, making.wanted, strict=True)):
            self.making.remove(making)
            making.future.set_result(making.groups(len(making.made) // len(making.prompts)))

    def until_one_is_done(self, pending: Collection[Verified]) -> None:
        while not any(future.done() for future in pending):
            self.work()


class Coins:
    """A task whose rewards follow from the sample's id; every third prompt is too easy to teach anything."""

    def prompts(self, split: str, seed: int) -> Generated:
        return Generated(lambda position: Prompt(f"p{position}", (1, position), "", ""))

    def verify(self, prompt: Prompt, response: Response) -> Verdict:
        easy = prompt.input_ids[1] % 3 == 0
        return Verdict(1.0 if easy or response.index == 0 else 0.0, easy)


def run_of(*overrides: str) -> Run:
    small = ["model.path=x", "train.prompts_per_step=3", "train.group_size=2", "train.steps=5"]
    return load(Run, [], [*small, *overrides]).run


def trained(
    run: Run, fleet_of: Callable[[int], FakeFleet], random: Random, resumes: Collection[int]
) -> list[StepBatch]:
    """Return what each step of a run takes, which stops and resumes before some of the steps."""
    fleet = fleet_of(0)
    stream = Stream(run, cast(Fleet, fleet), Coins())
    taken = []
    for step in range(run.train.steps):
        if step in resumes:
            state = json.loads(json.dumps(stream.state()))
            fleet = fleet_of(step)
            stream = Stream(run, cast(Fleet, fleet), Coins(), state)
        taken.append(stream.take(step, fleet.until_one_is_done))
        for _ in range(random.choice([0, 5, 100])):  # while the trainer trains
            if fleet.making:
                fleet.work()
        fleet.version = step + 1
        if run.rollout.max_lag:
            stream.request_groups(step + 1)
    assert not fleet.making
    return taken


def fates(taken: Sequence[StepBatch]) -> list[dict[str, Any]]:
    """Return the ledger of a run, in which no group without a signal is trained on."""
    return [
        dict(entry)
        for step, part in enumerate(taken)
        for entry in ledger_lines(step, part, {i for i, held in enumerate(part.used) if held.has_signal})
    ]


@settings(deadline=None, max_examples=150)
@given(
    random=st.randoms(use_true_random=False),
    max_lag=st.integers(0, 3),
    lies=st.sampled_from([0.0, 0.05]),
    resumes=st.sets(st.integers(1, 4)),
    dynamic=st.booleans(),
    in_prompt_order=st.booleans(),
)
def test_whatever_the_timing_no_sample_is_older_than_allowed_or_lost_or_used_twice(
    random: Random, max_lag: int, lies: float, resumes: set[int], dynamic: bool, in_prompt_order: bool
) -> None:
    more = ["train.filter_zero_variance=true", "train.max_resample_rounds=2"] if dynamic else []
    more += ["train.oversample=1.5"] if dynamic and in_prompt_order else []
    order = "prompt" if in_prompt_order else "completion"
    run = run_of(f"rollout.max_lag={max_lag}", f"rollout.order={order}", *more)
    fleets: list[FakeFleet] = []

    def fleet_of(version: int) -> FakeFleet:
        fleets.append(FakeFleet(random, version, lies))
        return fleets[-1]

    taken = trained(run, fleet_of, random, resumes)
    for step, part in enumerate(taken):
        for held in part.used:
            versions = [v for response in held.group.responses for v, _, _ in response.weight_versions]
            assert step - max_lag <= min(versions) <= max(versions) <= step
    ids = [held.group.id for part in taken for held in (*part.used, *(dropped.finished for dropped in part.dropped))]
    assert len(set(ids)) == len(ids)
    # Every prompt of the stream was asked for, in order, and every group of a fleet that lived on was accounted for.
    asked = set().union(*(fleet.asked for fleet in fleets))
    assert asked == {f"p{i}" for i in range(len(asked))}
    assert {held.group.prompt.id for part in taken for held in part.used} | {
        dropped.finished.group.prompt.id for part in taken for dropped in part.dropped
    } == asked
    if not dynamic and in_prompt_order:
        assert [[held.group.prompt.id for held in part.used] for part in taken] == [
            [f"p{i}" for i in range(3 * step, 3 * step + 3)] for step in range(5)
        ]
    if not lies and in_prompt_order:
        assert {dropped.fate for part in taken for dropped in part.dropped} <= {SURPLUS}
    # Back-pressure: resampling aside, no more than so many steps' groups are ever in the making.
    assert max(fleet.most for fleet in fleets) <= (max_lag + 1) * (5 if not dynamic else 15)


def test_a_group_that_is_too_old_is_dropped_once_and_its_prompt_asked_for_again_in_its_place() -> None:
    random = Random(1)
    run = run_of("rollout.max_lag=1")
    taken = trained(run, lambda version: FakeFleet(random, version, 0.04), random, ())
    old = [dropped for part in taken for dropped in part.dropped]
    assert {dropped.fate for dropped in old} == {TOO_OLD}
    used = {held.group.prompt.id: held.group.id for part in taken for held in part.used}
    assert all(used[d.finished.group.prompt.id] != d.finished.group.id for d in old)
    assert Counter(entry["fate"] for entry in fates(taken))[TOO_OLD] == len(old) > 0


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach() -> None:
    random = Random(0)
    run = run_of("train.filter_zero_variance=true", "train.max_resample_rounds=3", "train.oversample=1.2")
    taken = trained(run, lambda version: FakeFleet(random, version, 0.0), random, ())
    assert all(sum(held.has_signal for held in part.used) == 3 for part in taken)
    counted = Counter((entry["step"], entry["fate"]) for entry in fates(taken))
    assert all(counted[step, TRAINED] == 3 for step in range(5))
    assert sum(counted[step, NO_SIGNAL] for step in range(5)) >= 5
    assert sum(counted[step, SURPLUS] for step in range(5)) > 0
    assert any(part.resample_rounds for part in taken)


def test_resampling_is_bounded_and_then_the_batch_is_smaller() -> None:
    class Easy(Coins):
        def verify(self, prompt: Prompt, response: Response) -> Verdict:
            return Verdict(1.0, True)

    fleet = FakeFleet(Random(0), 0, 0.0)
    run = run_of("train.filter_zero_variance=true", "train.max_resample_rounds=2")
    part = Stream(run, cast(Fleet, fleet), Easy()).take(0, fleet.until_one_is_done)
    assert (part.resample_rounds, len(part.used), len(part.dropped)) == (2, 9, 0)


def test_in_order_of_completion_no_step_waits_for_a_long_response() -> None:
    run = run_of("rollout.max_lag=1", "rollout.order=completion")
    fleet = FakeFleet(Random(0), 0, 0.0)
    stream = Stream(run, cast(Fleet, fleet), Coins())
    stream.request_groups(0)
    held = fleet.making.pop(0)  # the first two groups make no token
    first = stream.take(0, fleet.until_one_is_done)
    assert not {prompt.id for prompt in held.prompts} & {group.group.prompt.id for group in first.used}
    assert len(first.used) == 3
    held.made = [[0] for _ in held.made]
    held.future.set_result(held.groups(2))
    fleet.version = 1
    second = stream.take(1, fleet.until_one_is_done)
    assert {prompt.id for prompt in held.prompts} <= {group.group.prompt.id for group in second.used}
    fleet.version = 2
    stream.take(2, fleet.until_one_is_done)


def test_a_state_of_the_other_order_is_refused() -> None:
    fleet = FakeFleet(Random(0), 0, 0.0)
    strict, completion = run_of("rollout.max_lag=1"), run_of("rollout.max_lag=1", "rollout.order=completion")
    for run, other in ((strict, completion), (completion, strict)):
        stream = Stream(run, cast(Fleet, fleet), Coins())
        stream.request_groups(0)
        with pytest.raises(ConfigError, match=r"rollout\.order"):
            Stream(other, cast(Fleet, fleet), Coins(), stream.state())


@pytest.mark.processes
@pytest.mark.parametrize("state_between", [False, True])
def test_lag_0_asks_for_what_a_synchronous_run_asks_for_and_gets_the_same(state_between: bool) -> None:
    run, task = run_of("rollout.max_lag=0", "rollout.sampling.max_new_tokens=5"), Coins()
    timeouts = Timeouts(start_timeout_seconds=5, probe_seconds=0.05)
    with (
        serving(FakeServer()) as (server,),
        Fleet.open([server.url], TensorTransport(1 << 20), timeouts, sequences_per_request=4) as fleet,
    ):
        stream = Stream(run, cast(Fleet, fleet), task)
        for step in range(3):
            server.version = str(step)
            fleet.members[0].version = fleet.sync.version = str(step)
            prompts = [task.prompts("train", 0)[i] for i in range(3 * step, 3 * step + 3)]
            expected = fleet.generate(prompts, 2, run.rollout.sampling, (0, step), step)
            if state_between:
                stream = Stream(run, cast(Fleet, fleet), task, json.loads(json.dumps(stream.state())))
            assert [held.group for held in stream.take(step).used] == expected
            assert not stream.state()["plans"]


def test_a_stop_while_waiting_loses_nothing() -> None:
    fleet, task = FakeFleet(Random(3), 0, 0.0), Coins()

    def stop(pending: Collection[Verified]) -> None:
        raise KeyboardInterrupt

    stream = Stream(run_of("rollout.max_lag=2"), cast(Fleet, fleet), task)
    with pytest.raises(KeyboardInterrupt):
        stream.take(0, stop)
    while len(fleet.making) > 3:
        fleet.work()
    state = json.loads(json.dumps(stream.state()))
    finished = [entry for plan in state["plans"] for entry in plan["held"]]
    assert 0 < len(finished) < 9
    again = FakeFleet(Random(4), 0, 0.0)
    stream = Stream(run_of("rollout.max_lag=2"), cast(Fleet, again), task, state)
    stream.request_groups(0)
    assert sum(again.asked.values()) == 9 - len(finished)
    assert {making.seed for making in again.making} <= {(0, 0), (0, 1), (0, 2)}  # as if nothing had happened
    assert len(stream.take(0, again.until_one_is_done).used) == 3


def test_a_saved_group_comes_back_whole_with_the_experts_it_took() -> None:
    fleet, run = FakeFleet(Random(3), 0, 0.0), run_of("rollout.max_lag=1")
    stream = Stream(run, cast(Fleet, fleet), Coins())
    stream.take(0, fleet.until_one_is_done)
    while fleet.making:
        fleet.work()
    stream.request_groups(0)
    assert isinstance(stream.buffer, Buffer)
    (plan,) = stream.buffer.plans.values()
    for held in plan.finished.values():
        for response in held.group.responses:
            object.__setattr__(
                response, "routes", torch.randint(9, (len(response.output_ids), 2, 3), dtype=torch.uint8)
            )
    again = Stream(run, cast(Fleet, FakeFleet(Random(4), 0, 0.0)), Coins(), json.loads(json.dumps(stream.state())))
    assert isinstance(again.buffer, Buffer)
    (restored,) = again.buffer.plans.values()
    assert restored.finished == plan.finished
    for place, held in plan.finished.items():
        for ours, theirs in zip(held.group.responses, restored.finished[place].group.responses, strict=True):
            assert ours.routes is not None
            assert theirs.routes is not None
            assert torch.equal(ours.routes, theirs.routes)
