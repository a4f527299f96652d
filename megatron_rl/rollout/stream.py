"""Sampled and verified groups, step after step: keeps the fleet as busy as the buffer allows.

    take(step)               wait until the groups of a step are sampled and verified; order replacements meanwhile
    request_groups(version)  after a push of weights, request the groups that these weights may sample

The fleet works in its own thread, from which finished groups go to the verifier: both continue while the trainer
trains. The calling thread moves verified groups into the buffer.
"""

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.rollout.buffer import Buffer, BufferConfig, FinishedGroup, SampleOrder, StepBatch
from megatron_rl.rollout.buffer_state import Json, restore, snapshot
from megatron_rl.rollout.completion import CompletionBuffer
from megatron_rl.rollout.routes import requested_routes
from megatron_rl.tasks.base import Task
from megatron_rl.tasks.pool import InlineVerifier, Verdicts, Verifier, settle

Sampled = Future[list[Group]]
Verified = Future[list[tuple[Group, Verdicts]]]


def buffer_config(run: Run) -> BufferConfig:
    """Return the buffer's part of a configuration."""
    train = run.train
    return BufferConfig(
        prompts_per_step=train.prompts_per_step,
        steps=train.steps,
        max_lag=run.rollout.max_lag,
        filter_zero_variance=train.filter_zero_variance,
        max_resample_rounds=train.max_resample_rounds,
        oversample=train.oversample,
        separate_rewards=run.advantage.kind == "gdpo",
    )


def wait_for_any(pending: Collection[Verified]) -> None:
    """Return when one of the futures is done."""
    wait(pending, return_when=FIRST_COMPLETED)


def verify_groups(sampled: Sampled, verifier: Verifier) -> Verified:
    """Return a future of the groups with their verdicts."""
    verified: Verified = Future()

    def submit(sampled: Sampled) -> None:
        error = CancelledError() if sampled.cancelled() else sampled.exception()
        if error is not None:
            verified.set_exception(error)
            return
        groups = sampled.result()
        verdicts = verifier.submit(groups)
        verdicts.add_done_callback(lambda v: settle(verified, lambda: list(zip(groups, v.result(), strict=True))))

    sampled.add_done_callback(submit)
    return verified


class Stream:
    """The groups of a run, from the start or from a saved state."""

    def __init__(
        self, run: Run, fleet: Fleet, task: Task, state: Json | None = None, verifier: Verifier | None = None
    ) -> None:
        self.run, self.fleet = run, fleet
        self.verifier = verifier or InlineVerifier(task.verify)
        self.prompts = task.prompts("train", run.train.seed)
        self.buffer: Buffer | CompletionBuffer
        self.buffer = (Buffer if run.rollout.order == "prompt" else CompletionBuffer)(buffer_config(run))
        if state is not None:
            restore(self.buffer, state, self.prompts)
        self._routes = requested_routes(run)
        self._pending: dict[Verified, tuple[SampleOrder, int]] = {}

    def take(self, step: int, wait: Callable[[Collection[Verified]], None] = wait_for_any) -> StepBatch:
        """Return the groups of a step whose weights the fleet has; if ``wait`` raises, nothing is lost."""
        while True:
            self.request_groups(step)
            batch = self.buffer.take(step)
            if batch is not None:
                return batch
            wait(self._pending.keys())

    def request_groups(self, version: int) -> None:
        """Store finished groups, and request all groups that weights of this version may sample."""
        self._store_finished()
        for order in self.buffer.orders(version):
            self._submit(order)

    def progress(self) -> int:
        """Return a number that changes while servers work or groups are verified. Callable in any thread."""
        return self.fleet.answers + sum(future.done() for future in tuple(self._pending)) - len(self._pending)

    def state(self) -> Json:
        """Return what a resumed run needs in order to lose no finished group and use none twice."""
        self._store_finished()
        return snapshot(self.buffer)

    def _submit(self, order: SampleOrder) -> None:
        train, rollout = self.run.train, self.run.rollout
        # The first order of a step has the same seeds and ids as without lag.
        seed = (train.seed, order.step, order.round) if order.round else (train.seed, order.step)
        # In order of completion a later step may take the group, with tokens of newer weights.
        last = order.step if rollout.order == "prompt" else train.steps
        versions = range(max(0, order.step - rollout.max_lag), last + 1)
        prompts = [self.prompts[position] for position in order.positions]
        requests = self.fleet.submit(
            prompts, train.group_size, rollout.sampling, seed, versions, indices=order.missing, routes=self._routes
        )
        for first, sampled in requests:
            self._pending[verify_groups(sampled, self.verifier)] = (order, first)

    def _store_finished(self) -> None:
        separate = self.buffer.config.separate_rewards
        for future in [future for future in self._pending if future.done()]:
            order, first = self._pending.pop(future)
            groups = [FinishedGroup(group, verdicts, separate) for group, verdicts in future.result()]
            self.buffer.put(order, first, groups)
