"""Which groups may be requested, which are finished, and which may be trained on.

    prompts --> orders --> fleet (in progress) --> finished --> take(step) --> trained
                  ^                                   |             |
                  |   resample: no signal             +--> no signal <--+--> surplus
                  +-- repeat: too old -------------------> too old

    step          s          s+1         ...        s+max_lag        s+max_lag+1
                  taken when complete    in progress or finished     BACK-PRESSURE: not ordered
                                                                     before weights s+1 are pushed

Version s is the version of the weights that step s trains. Every token of a group that step s takes was sampled by
weights of versions s - max_lag to s; a response that was paused for a push counts with its oldest token. A group that
violates this is dropped and counted, and its prompt is requested again. With max_lag = 0 nothing is in progress while
the trainer trains.

Groups are consumed in prompt order: a step takes the next prompts of the stream and waits for all of them, so batches
are not biased toward short responses. At most ``(max_lag + 1) * prompts_per_step`` groups (times ``oversample``) are in
progress or finished.

The buffer is plain data without threads or clocks: its owner reports finished groups and asks for orders.
``buffer_state`` saves and restores it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rl.data.types import Group
from megatron_rl.tasks.base import Verdict

TRAINED, NO_SIGNAL, SURPLUS, TOO_OLD = "trained", "no signal", "surplus", "too old"
FATES = (TRAINED, NO_SIGNAL, SURPLUS, TOO_OLD)
"""The possible outcomes of a group, as written to ``ledger.jsonl``."""


@dataclass(frozen=True)
class BufferConfig:
    """The settings of a run that the buffer depends on."""

    prompts_per_step: int
    steps: int
    max_lag: int = 0
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal."""
    max_resample_rounds: int = 0
    oversample: float = 1.0
    separate_rewards: bool = False
    """Several rewards are normalized separately (GDPO): a group has a signal if any one of them differs."""


@dataclass(frozen=True)
class SampleOrder:
    """Prompts to sample for a step in one request to the fleet."""

    step: int
    round: int
    """Number of earlier orders of the step; makes the seeds and ids of the samples unique."""
    positions: tuple[int, ...]
    """Positions of the prompts in the stream."""
    slots: tuple[int, ...]
    """Slots of the plan that the groups fill, one per prompt."""
    missing: tuple[int, ...]
    """Indices of the prompts whose groups are missing: all of them, unless a resumed run repeats the order."""


@dataclass(frozen=True)
class FinishedGroup:
    """A sampled group and its verdicts."""

    group: Group
    verdicts: tuple[Verdict, ...]
    separate_rewards: bool = False
    """As in ``BufferConfig``."""

    @property
    def has_signal(self) -> bool:
        """Whether the rewards of the verified responses differ."""
        verified = [verdict for verdict in self.verdicts if verdict.score is not None]
        return len({tuple(v.rewards.items()) if self.separate_rewards else v.score for v in verified}) > 1


@dataclass(frozen=True)
class DroppedGroup:
    """A group that is not trained on."""

    finished: FinishedGroup
    fate: str
    """Why it was dropped: ``SURPLUS`` or ``TOO_OLD``."""
    position: int
    """Position of its prompt in the stream."""


@dataclass(frozen=True)
class StepBatch:
    """The groups of a step."""

    used: tuple[FinishedGroup, ...]
    """Groups to train on, in prompt order; groups without a signal are still included."""
    dropped: tuple[DroppedGroup, ...]
    resample_rounds: int
    """How many times more prompts were requested to replace groups without a signal."""

    @property
    def groups(self) -> list[FinishedGroup]:
        """All groups, the used ones first."""
        return [*self.used, *(dropped.finished for dropped in self.dropped)]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts of all groups' responses."""
        return [verdict for finished in self.groups for verdict in finished.verdicts]


@dataclass
class StepPlan:
    """A future step: its slots, each for the group of one prompt."""

    positions: list[int] = field(default_factory=list)
    """Position in the stream of each slot's prompt."""
    finished: dict[int, FinishedGroup] = field(default_factory=dict)
    """Slot -> its group."""
    pending: dict[int, int] = field(default_factory=dict)
    """Slot -> round of the order that its group is expected from."""
    orders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Round -> slots, for the orders with pending groups."""
    submitted: set[int] = field(default_factory=set)
    """Rounds whose orders were returned by ``new_orders``; not saved."""
    dropped: list[DroppedGroup] = field(default_factory=list)
    rounds: int = 0
    """Number of orders so far."""
    resample_rounds: int = 0

    def empty_slots(self) -> list[int]:
        """Return the slots whose group is neither finished nor pending."""
        return [slot for slot in range(len(self.positions)) if slot not in self.finished and slot not in self.pending]

    def order(self, slots: Sequence[int]) -> None:
        """Add an order for the groups of these slots, if there are any."""
        if slots:
            self.orders[self.rounds] = tuple(slots)
            self.pending.update(dict.fromkeys(slots, self.rounds))
            self.rounds += 1

    def new_orders(self, step: int) -> list[SampleOrder]:
        """Return the orders that were not returned before."""
        new = [(number, slots) for number, slots in self.orders.items() if number not in self.submitted]
        self.submitted.update(number for number, _ in new)
        return [
            SampleOrder(
                step,
                number,
                tuple(self.positions[slot] for slot in slots),
                slots,
                tuple(i for i, slot in enumerate(slots) if self.pending.get(slot) == number),
            )
            for number, slots in new
        ]

    def put(self, number: int, slot: int, finished: FinishedGroup) -> None:
        """Store a group of an order, unless its slot expects none from it: a repeated order may bring extra groups."""
        if self.pending.get(slot) == number:
            del self.pending[slot]
            self.finished[slot] = finished
            if number not in self.pending.values():
                del self.orders[number]


class Buffer:
    """The groups of the steps that are not trained yet, in prompt order."""

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.next_position = 0
        """Position in the stream of the next prompt."""
        self.plans: dict[int, StepPlan] = {}
        """Step -> its plan."""
        self._next_step = 0  # the first step that was not taken

    @property
    def pending(self) -> int:
        """Number of groups in progress."""
        return sum(len(plan.pending) for plan in list(self.plans.values()))

    @property
    def finished_groups(self) -> list[FinishedGroup]:
        """The finished groups."""
        return [finished for plan in list(self.plans.values()) for finished in list(plan.finished.values())]

    @property
    def steps(self) -> int:
        """Number of steps for which groups are sampled."""
        return len(self.plans)

    def orders(self, version: int) -> list[SampleOrder]:
        """Return what to request from the fleet now that it has weights of this version; returns each order once."""
        last = min(version + self.config.max_lag, self.config.steps - 1)
        for step in range(max(version, self._next_step), last + 1):
            if step not in self.plans:
                self.plans[step] = StepPlan()
                self._add_slots(self.plans[step], self.config.prompts_per_step)
        orders: list[SampleOrder] = []
        for step, plan in sorted(self.plans.items()):
            self._drop_old(step, plan)
            plan.order(plan.empty_slots())
            if not plan.pending and (shortfall := self._shortfall(plan)):
                plan.resample_rounds += 1
                self._add_slots(plan, shortfall)
                plan.order(plan.empty_slots())
            orders += plan.new_orders(step)
        return orders

    def put(self, order: SampleOrder, first: int, groups: Sequence[FinishedGroup]) -> None:
        """Store finished groups of an order; ``first`` is the index in the order of the first of them."""
        for slot, finished in zip(order.slots[first : first + len(groups)], groups, strict=True):
            self.plans[order.step].put(order.round, slot, finished)

    def take(self, step: int) -> StepBatch | None:
        """Remove and return the groups of a step; None while some are pending or have to be ordered."""
        plan = self.plans.get(step)
        if plan is None or len(plan.finished) < len(plan.positions):
            return None
        if self._old_slots(step, plan) or self._shortfall(plan):
            return None
        del self.plans[step]
        self._next_step = step + 1
        used: list[FinishedGroup] = []
        needed = self.config.prompts_per_step
        for slot, finished in sorted(plan.finished.items()):
            if needed or not self.config.filter_zero_variance:
                used.append(finished)
                needed -= finished.has_signal
            else:
                plan.dropped.append(DroppedGroup(finished, SURPLUS, plan.positions[slot]))
        return StepBatch(tuple(used), tuple(plan.dropped), plan.resample_rounds)

    def _add_slots(self, plan: StepPlan, groups: int) -> None:
        """Add slots for the next prompts of the stream, ``oversample`` times as many as groups are needed."""
        count = math.ceil(groups * self.config.oversample)
        plan.positions += range(self.next_position, self.next_position + count)
        self.next_position += count

    def _shortfall(self, plan: StepPlan) -> int:
        """Return how many groups with a signal a complete plan lacks; 0 after the last resampling round."""
        if plan.resample_rounds >= self.config.max_resample_rounds:
            return 0
        return max(0, self.config.prompts_per_step - sum(group.has_signal for group in plan.finished.values()))

    def _old_slots(self, step: int, plan: StepPlan) -> list[int]:
        """Return the slots whose groups are too old for their step; an unknown version (-1) counts as new."""
        oldest = step - self.config.max_lag
        return [slot for slot, finished in plan.finished.items() if 0 <= finished.group.oldest_version < oldest]

    def _drop_old(self, step: int, plan: StepPlan) -> None:
        plan.dropped += [
            DroppedGroup(plan.finished.pop(slot), TOO_OLD, plan.positions[slot]) for slot in self._old_slots(step, plan)
        ]
