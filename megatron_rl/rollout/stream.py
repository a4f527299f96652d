"""Groups for step after step: keeps the fleet busy as far as the buffer allows, and has finished groups verified.

    take(s)      wait until the groups of step s are whole and verified; meanwhile take what comes, and refill
    ahead(s + 1) after the push of weights s + 1: ask for the steps that these weights may sample for

The fleet works in a thread of its own, and hands finished groups to the judges there, who may have processes of their
own: both go on while the trainer trains. What has come is taken in by the calling thread.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import Protocol

from megatron_rl.config.schema import Run, Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt
from megatron_rl.rollout.buffer import Buffer, BufferConfig, FinishedGroup, SampleOrder, StepBatch
from megatron_rl.rollout.buffer_state import Json, restore, snapshot
from megatron_rl.rollout.routes import wanted_routes
from megatron_rl.tasks.base import Task
from megatron_rl.tasks.pool import InlineVerifier, Verdicts, Verifier, settle

Pending = Future[list[Group]]
Judged = Future[list[tuple[Group, Verdicts]]]


class Fleet(Protocol):
    """The part of a fleet that samples."""

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: Sequence[int],
        weight_versions: range | None = None,
        *,
        wanted: Collection[int] | None = None,
        routes: RouteShape | None = None,
    ) -> list[tuple[int, Pending]]:
        """Ask and do not wait: see ``rollout.fleet``."""
        ...


def buffer_config(run: Run) -> BufferConfig:
    """Return what a configuration asks of the buffer."""
    train = run.train
    return BufferConfig(
        prompts_per_step=train.prompts_per_step,
        steps=train.steps,
        max_lag=run.rollout.max_lag,
        filtered=train.filter_zero_variance,
        refills=train.refills,
        oversample=train.oversample,
        apart=run.advantage.kind == "gdpo",
    )


def wait_for_one(pending: Collection[Judged]) -> None:
    """Return when one has finished."""
    wait(pending, return_when=FIRST_COMPLETED)


def verify_groups(pending: Pending, verifier: Verifier) -> Judged:
    """Return the groups with their verdicts, once both are there."""
    done: Judged = Future()

    def sampled(pending: Pending) -> None:
        error = CancelledError() if pending.cancelled() else pending.exception()
        if error is not None:
            done.set_exception(error)
            return
        groups = pending.result()
        verdicts = verifier.submit(groups)
        verdicts.add_done_callback(lambda v: settle(done, lambda: list(zip(groups, v.result(), strict=True))))

    pending.add_done_callback(sampled)
    return done


class Stream:
    """The groups of a run from a step on."""

    def __init__(
        self, run: Run, fleet: Fleet, task: Task, state: Json | None = None, verifier: Verifier | None = None
    ) -> None:
        self.run, self.fleet = run, fleet
        self.verifier = verifier or InlineVerifier(task.verify)
        self.prompts = task.prompts("train", run.train.seed)
        self.buffer = Buffer(buffer_config(run))
        if state is not None:
            restore(self.buffer, state, self.prompts)
        self._routes = wanted_routes(run)
        self._pending: dict[Judged, tuple[SampleOrder, int]] = {}

    def take(self, step: int, wait: Callable[[Collection[Judged]], None] = wait_for_one) -> StepBatch:
        """Return the groups of a step, whose weights the fleet has; ``wait`` may raise, and nothing is lost."""
        while True:
            self.ahead(step)
            taken = self.buffer.take(step)
            if taken is not None:
                return taken
            wait(self._pending.keys())

    def ahead(self, version: int) -> None:
        """Take what has come and ask for what may be asked for, now that the fleet has weights of this version."""
        self._absorb()
        for order in self.buffer.orders(version):
            self._submit(order)

    def state(self) -> Json:
        """Return all that a resumed run needs to lose no finished group and to use none twice."""
        self._absorb()
        return snapshot(self.buffer)

    def _submit(self, order: SampleOrder) -> None:
        train, rollout = self.run.train, self.run.rollout
        # The first order of a step has the seeds and ids that it would have without lag.
        seed = (train.seed, order.step, order.round) if order.round else (train.seed, order.step)
        versions = range(max(0, order.step - rollout.max_lag), order.step + 1)
        prompts = [self.prompts[position] for position in order.positions]
        asked = self.fleet.submit(
            prompts, train.group_size, rollout.sampling, seed, versions, wanted=order.wanted, routes=self._routes
        )
        for first, pending in asked:
            self._pending[verify_groups(pending, self.verifier)] = (order, first)

    def _absorb(self) -> None:
        for pending in [pending for pending in self._pending if pending.done()]:
            order, first = self._pending.pop(pending)
            apart = self.buffer.demand.apart
            self.buffer.put(
                order, first, [FinishedGroup(group, verdicts, apart) for group, verdicts in pending.result()]
            )
