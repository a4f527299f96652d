"""Where batches come from: on the main rank the fleet, the task and the journal of samples; elsewhere the main rank.

The two classes have the same methods, and each call is collective, so that the loop never asks which rank it is.
"""

import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Protocol, TypeVar, get_args

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch, Group, Metrics
from megatron_rl.distributed.mesh import World
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.observability.mismatch_report import MismatchReport
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.observability.token_record import TokenRecord
from megatron_rl.rollout.buffer import SURPLUS, TOO_OLD, StepBatch
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.collect import collect, share
from megatron_rl.rollout.evaluation_requests import heldout_prompts, question
from megatron_rl.rollout.fleet_setup import PolicyWeights, push_weights
from megatron_rl.rollout.gauges import readings
from megatron_rl.rollout.group_ledger import entries
from megatron_rl.rollout.routes import requested_routes
from megatron_rl.rollout.stream import Stream, Verified, wait_for_any
from megatron_rl.tasks.base import Failure, Task, Verdict
from megatron_rl.tasks.pool import Verifier

T = TypeVar("T")


class Sampler(Protocol):
    """A source of batches that is kept up to date with the weights."""

    counts: Mapping[str, float | int]
    """What was counted on the way to the newest batch; empty on all ranks but the main one."""

    def sample(self, step: int) -> Batch | None:
        """Return the batch of a step on every rank; None if the run was asked to stop."""
        ...

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation is due before this step."""
        ...

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy on held-out prompts and how many prompts; None elsewhere, or if asked to stop."""
        ...

    def name_of(self, sample_index: int) -> str | None:
        """Return the id of a sample of the newest step, by its place in the step; None on the other ranks."""
        ...

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """Explain the gap between the engine's log-probs and the trainer's."""
        ...

    def record(self, step: int, prepared: Batch, summed: Metrics) -> None:
        """Keep what an update made of its tokens, where the loss was asked to."""
        ...

    def load(self, weights: PolicyWeights, version: int) -> None:
        """Bring new weights to the fleet."""
        ...

    def state(self) -> Json:
        """Return what a checkpoint must keep of the sampler, as JSON; nothing on the other ranks."""
        ...

    def load_state(self, state: Json) -> None:
        """Go on from what ``state`` gave."""
        ...


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks the run to end after its step; srun hands on the last one only."""


class StopRequested(BaseException):
    """A signal to stop arrived while the fleet was sampling; nothing was lost, no batch was begun."""


def is_due(run: Run, step: int) -> bool:
    """Return whether ``evaluate.every`` asks for an evaluation before this step, or after the last."""
    every = run.evaluate.every
    return every > 0 and (step % every == 0 or step == run.train.steps)


class MainSampler:
    """Samples with the fleet, verifies, and shares the batch."""

    def __init__(
        self,
        run: Run,
        world: World,
        sources: tuple[Fleet, Task, Verifier],
        journal: RunRecorder,
        witness: MismatchReport,
    ) -> None:
        self.run, self.world, self.journal, self.witness = run, world, journal, witness
        self.fleet, self.task, self.verifier = sources
        self.tokens = TokenRecord(run.log.tokens, witness.codec)
        self.groups: Sequence[Group] = ()
        self.counts: Mapping[str, float | int] = {}
        self.stream = Stream(run, self.fleet, self.task, verifier=self.verifier)
        self._busy_seconds = 0.0
        self._heldout = heldout_prompts(run, self.task) if run.evaluate.every else ()
        self._stop = False
        self._sampling = False
        journal.watch(lambda: readings(self.stream, self.fleet))
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if self._sampling:
            raise StopRequested

    def sample(self, step: int) -> Batch | None:
        """See ``Sampler``."""
        return share(self._sample(step), self.world)

    def _sample(self, step: int) -> Batch | None:
        taken = self._unless_stopped(lambda: self.stream.take(step, self._wait))
        if taken is None:
            return None
        kept = [*taken.used, *(dropped.finished for dropped in taken.dropped)]
        self.groups = [held.group for held in kept]
        if self.run.log.rollouts:
            self.journal.rollouts(step, self.groups, [held.verdicts for held in kept])
        batch = collect(self.groups[: len(taken.used)], [held.verdicts for held in taken.used], self.run)
        trained = set(batch["group_ids_B"].tolist())
        verdicts = [verdict for held in kept for verdict in held.verdicts]
        self.counts = counts(taken) | failures(verdicts) | reward_means(verdicts)
        if (lost := lost_words(step, verdicts)) is not None:
            self.journal.say(lost)
        self.journal.ledger(entries(step, taken, trained))
        return batch

    def _wait(self, pending: Collection[Verified]) -> None:
        self._interruptible(lambda: wait_for_any(pending))

    def _interruptible(self, get: Callable[[], T]) -> T:
        """Return what a call returns; StopRequested if a stop is asked for before or meanwhile."""
        self._sampling = True
        try:
            if self._stop:
                raise StopRequested
            return get()
        finally:
            self._sampling = False

    def _unless_stopped(self, get: Callable[[], T]) -> T | None:
        """Return what a call returns; None if a stop was asked for, before it or while it waits."""
        try:
            return None if self._stop else get()
        except StopRequested:
            return None

    def evaluates(self, step: int) -> bool:
        """See ``Sampler``."""
        return is_due(self.run, step)

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """See ``Sampler``."""
        asked = question(self.run, self._heldout, step)
        ask = partial(self.fleet.generate, *asked, step, requested_routes(self.run))
        groups = self._unless_stopped(lambda: self._interruptible(ask))
        if groups is None:
            return None
        judged = self._unless_stopped(lambda: self._interruptible(self.verifier.submit(groups).result))
        if judged is None:
            return None
        correct = [verdict.correct for verdicts in judged for verdict in verdicts]
        return sum(correct) / len(correct), len(groups)

    def name_of(self, sample_index: int) -> str | None:
        """See ``Sampler``."""
        return [response.id for group in self.groups for response in group.responses][sample_index]

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """See ``Sampler``."""
        verdict = self.witness.compare(step, self.groups, Batch.join(scored))
        if verdict is not None:
            self.journal.say(verdict)

    def record(self, step: int, prepared: Batch, summed: Metrics) -> None:
        """See ``Sampler``."""
        if not summed.tokens:
            return
        self.tokens.add(prepared.add(summed.tokens))
        if self.tokens.updates == self.run.train.updates_per_step:
            self.journal.tokens(self.tokens.take(step, self.groups))

    def state(self) -> Json:
        """See ``Sampler``."""
        return self.stream.state()

    def load_state(self, state: Json) -> None:
        """See ``Sampler``."""
        self.stream = Stream(self.run, self.fleet, self.task, state, self.verifier)

    def load(self, weights: PolicyWeights, version: int) -> None:
        """See ``Sampler``."""
        push_weights(self.run, self.world, weights, version, self.fleet)
        busy, self._busy_seconds = self._busy_seconds, self.fleet.busy_seconds
        self.journal.note("fleet", self._busy_seconds - busy)
        if self.run.rollout.max_lag and not self._stop and not self.evaluates(version):
            self.stream.sample_ahead(version)


def counts(taken: StepBatch) -> dict[str, float | int]:
    """Return what ``metrics.jsonl`` tells of the groups of a step that is not in its batch."""
    everything = [*taken.used, *(dropped.finished for dropped in taken.dropped if dropped.fate != TOO_OLD)]
    no_signal = sum(not held.has_signal for held in everything)
    why = Counter(dropped.fate for dropped in taken.dropped)
    return {
        "zero_variance_fraction": no_signal / len(everything),
        "groups_no_signal": no_signal,
        "groups_surplus": why[SURPLUS],
        "groups_too_old": why[TOO_OLD],
        "refills": taken.resample_rounds,
    }


def failures(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return how many responses have no score, by what happened to their verifier."""
    why = Counter(verdict.failure for verdict in verdicts)
    return {f"unverified_{failure}": why[failure] for failure in get_args(Failure) if failure}


def reward_means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the mean of each reward where there are several, over the verified responses."""
    several = [verdict.rewards for verdict in verdicts if verdict.rewards]
    return {f"reward/{name}": sum(r[name] for r in several) / len(several) for name in (several[0] if several else ())}


def lost_words(step: int, verdicts: Sequence[Verdict]) -> str | None:
    """Return a line for people if verifiers failed: how many, and the first reason."""
    lost = [verdict for verdict in verdicts if verdict.failure not in ("", "declined")]
    if not lost:
        return None
    what = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in Counter(v.failure for v in lost).items())
    return f"step {step}: {len(lost)} of {len(verdicts)} responses unverified ({what}); the first: {lost[0].reason}"


class FollowingSampler:
    """Receives what the main rank shares, and helps it gather the weights."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.counts: Mapping[str, float | int] = {}
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def sample(self, step: int) -> Batch | None:
        """See ``Sampler``."""
        return share(None, self.world)

    def evaluates(self, step: int) -> bool:
        """See ``Sampler``."""
        return is_due(self.run, step)

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """See ``Sampler``."""

    def name_of(self, sample_index: int) -> str | None:
        """See ``Sampler``."""

    def compare(self, step: int, scored: Sequence[Batch]) -> None:
        """See ``Sampler``."""

    def record(self, step: int, prepared: Batch, summed: Metrics) -> None:
        """See ``Sampler``."""

    def load(self, weights: PolicyWeights, version: int) -> None:
        """See ``Sampler``."""
        push_weights(self.run, self.world, weights, version, fleet=None)

    def state(self) -> Json:
        """See ``Sampler``."""
        return {}

    def load_state(self, state: Json) -> None:
        """See ``Sampler``."""
