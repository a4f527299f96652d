"""Groups for step after step: keeps the fleet busy as far as the buffer allows, and has finished groups verified.

    take(s)      wait until the groups of step s are whole; meanwhile verify what comes, and refill
    ahead(s + 1) after the push of weights s + 1: ask for the steps that these weights may sample for

All of it happens in the calling thread, between the trainer's own phases: verifiers need not know of threads. The fleet
works in its own.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from megatron_rl.config.schema import Run, Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt
from megatron_rl.tasks.base import Task, Verdict
from megatron_rl.train.buffer import Buffer, Demand, Held, Order, Taken
from megatron_rl.train.buffer_state import Json, restore, snapshot
from megatron_rl.train.routes import wanted_routes

Pending = Future[list[Group]]


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


def demand_of(run: Run) -> Demand:
    """Return what a configuration asks of the buffer."""
    train = run.train
    return Demand(
        prompts_per_step=train.prompts_per_step,
        steps=train.steps,
        max_lag=run.rollout.max_lag,
        filtered=train.filter_zero_variance,
        refills=train.refills,
        oversample=train.oversample,
    )


def wait_for_one(pending: Collection[Pending]) -> None:
    """Return when one has finished."""
    wait(pending, return_when=FIRST_COMPLETED)


def verify(task: Task, group: Group) -> tuple[Verdict, ...]:
    """Return what the task says about each response of a group."""
    return tuple(task.verify(group.prompt, response) for response in group.responses)


class Stream:
    """The groups of a run from a step on."""

    def __init__(self, run: Run, fleet: Fleet, task: Task, state: Json | None = None) -> None:
        self.run, self.fleet, self.task = run, fleet, task
        self.prompts = task.prompts("train", run.train.seed)
        self.buffer = Buffer(demand_of(run))
        if state is not None:
            restore(self.buffer, state, self.prompts)
        self._routes = wanted_routes(run)
        self._pending: dict[Pending, tuple[Order, int]] = {}

    def take(self, step: int, wait: Callable[[Collection[Pending]], None] = wait_for_one) -> Taken:
        """Return the groups of a step, whose weights the fleet has; ``wait`` may raise, and nothing is lost."""
        while True:
            self.ahead(step)
            taken = self.buffer.take(step)
            if taken is not None:
                return taken
            wait(self._pending.keys())

    def ahead(self, version: int) -> None:
        """Verify what has come and ask for what may be asked for, now that the fleet has weights of this version."""
        self._absorb()
        for order in self.buffer.orders(version):
            self._submit(order)

    def state(self) -> Json:
        """Return all that a resumed run needs to lose no finished group and to use none twice."""
        self._absorb()
        return snapshot(self.buffer)

    def _submit(self, order: Order) -> None:
        train, rollout = self.run.train, self.run.rollout
        # The first order of a step has the seeds and ids that it would have without lag.
        seed = (train.seed, order.step, order.round) if order.round else (train.seed, order.step)
        versions = range(max(0, order.step - rollout.max_lag), order.step + 1)
        prompts = [self.prompts[position] for position in order.positions]
        asked = self.fleet.submit(
            prompts, train.group_size, rollout.sampling, seed, versions, wanted=order.wanted, routes=self._routes
        )
        for first, pending in asked:
            self._pending[pending] = (order, first)

    def _absorb(self) -> None:
        for pending in [pending for pending in self._pending if pending.done()]:
            order, first = self._pending.pop(pending)
            self.buffer.put(order, first, [Held(group, verify(self.task, group)) for group in pending.result()])
