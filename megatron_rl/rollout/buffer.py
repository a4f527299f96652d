"""What lies between the fleet and the trainer: which groups may be asked for, which are there, which may be trained on.

    prompts --> orders --> fleet (in the making) --> held (finished) --> take(step) --> trained
                  ^                                     |                  |
                  |   refill: a group without a signal  +--> no signal <---+--> surplus
                  +-- again: a group that is too old ------> too old

    step          s          s+1         ...        s+max_lag        s+max_lag+1
                  taken when whole       in the making or held       BACK-PRESSURE: not ordered
                                                                     before weights s+1 are pushed

The contract. The weights that step s trains have version s. Every token of a group that step s takes was made by
weights of a version from s - max_lag to s; a response that was paused for a push counts with its oldest token.
A group that would break this is not trained on: it is dropped, counted, and its prompt asked for again. With
max_lag = 0 nothing is in the making while the trainer trains.

A step gets the prompts that stand next in the stream, and waits for all of them: what is fast does not push in, so a
batch leans no more to short responses than it would without lag. At most ``(max_lag + 1) * prompts_per_step`` groups
(times ``oversample``) are in the making or held.

Plain data, one thread, no clock: its owner says what came and asks what to do. ``snapshot`` is all there is to save.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rl.data.types import Group
from megatron_rl.tasks.base import Verdict

TRAINED, NO_SIGNAL, SURPLUS, TOO_OLD = "trained", "no signal", "surplus", "too old"
FATES = (TRAINED, NO_SIGNAL, SURPLUS, TOO_OLD)
"""What can become of a group."""


@dataclass(frozen=True)
class BufferConfig:
    """What a run asks of its buffer."""

    prompts_per_step: int
    steps: int
    max_lag: int = 0
    filtered: bool = False
    """Groups without a signal are no use."""
    refills: int = 0
    oversample: float = 1.0
    apart: bool = False
    """See ``FinishedGroup``."""


@dataclass(frozen=True)
class SampleOrder:
    """Prompts to sample for a step, in one go."""

    step: int
    round: int
    """Orders of the step before this one: makes the seeds and ids of its samples its own."""
    positions: tuple[int, ...]
    """Of the prompts in the stream."""
    places: tuple[int, ...]
    """Of their groups in the plan."""
    wanted: tuple[int, ...]
    """Which of these are still to come: all, but for an order that a resumed run repeats."""


@dataclass(frozen=True)
class FinishedGroup:
    """A finished group and what its verifier said."""

    group: Group
    verdicts: tuple[Verdict, ...]
    apart: bool = False
    """Several rewards are normalised apart: it is enough if one of them differs."""

    @property
    def signal(self) -> bool:
        """Whether its rewards differ."""
        verified = [verdict for verdict in self.verdicts if verdict.score is not None]
        return len({tuple(v.rewards.items()) if self.apart else v.score for v in verified}) > 1


@dataclass(frozen=True)
class DroppedGroup:
    """A group that is not trained on, and why."""

    held: FinishedGroup
    why: str
    position: int
    """Of its prompt in the stream."""


@dataclass(frozen=True)
class StepBatch:
    """What a step gets."""

    used: tuple[FinishedGroup, ...]
    """To train on, in the order of the stream. Groups without a signal are still among them."""
    dropped: tuple[DroppedGroup, ...]
    refills: int


@dataclass
class StepPlan:
    """A step that groups are gathered for: places, each for one group."""

    positions: list[int] = field(default_factory=list)
    """Of each place's prompt in the stream."""
    held: dict[int, FinishedGroup] = field(default_factory=dict)
    """By place."""
    coming: dict[int, int] = field(default_factory=dict)
    """Place -> round of the order that a group is to come from."""
    orders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Round -> places, of the orders that a group is still to come from."""
    given: set[int] = field(default_factory=set)
    """Rounds whose orders went out; not saved."""
    dropped: list[DroppedGroup] = field(default_factory=list)
    rounds: int = 0
    refills: int = 0

    def vacant(self) -> list[int]:
        """Return the places without a group, in hand or to come."""
        return [place for place in range(len(self.positions)) if place not in self.held and place not in self.coming]

    def order(self, places: Sequence[int]) -> None:
        """Order groups for these places."""
        if places:
            self.orders[self.rounds] = tuple(places)
            self.coming.update(dict.fromkeys(places, self.rounds))
            self.rounds += 1

    def give(self, step: int) -> list[SampleOrder]:
        """Return the orders that are to go out, once."""
        due = [(number, places) for number, places in self.orders.items() if number not in self.given]
        self.given.update(number for number, _ in due)
        return [
            SampleOrder(
                step,
                number,
                tuple(self.positions[place] for place in places),
                places,
                tuple(i for i, place in enumerate(places) if self.coming.get(place) == number),
            )
            for number, places in due
        ]

    def put(self, number: int, place: int, held: FinishedGroup) -> None:
        """Take a group, unless this place expects none from this order: a repeated one may bring too many."""
        if self.coming.get(place) == number:
            del self.coming[place]
            self.held[place] = held
            if number not in self.coming.values():
                del self.orders[number]


class Buffer:
    """The groups of the steps to come."""

    def __init__(self, demand: BufferConfig) -> None:
        self.demand = demand
        self.position = 0
        """Of the next prompt in the stream."""
        self.plans: dict[int, StepPlan] = {}
        """By step."""
        self._first = 0  # step that was not taken yet

    def orders(self, version: int) -> list[SampleOrder]:
        """Return what to ask the fleet for now that it has weights of this version; each order is returned once."""
        for step in range(max(version, self._first), min(version + self.demand.max_lag, self.demand.steps - 1) + 1):
            if step not in self.plans:
                self.plans[step] = StepPlan()
                self._extend(self.plans[step], self.demand.prompts_per_step)
        made: list[SampleOrder] = []
        for step, plan in sorted(self.plans.items()):
            self._drop_old(step, plan)
            plan.order(plan.vacant())
            if not plan.coming and (lacking := self._lacking(plan)):
                plan.refills += 1
                self._extend(plan, lacking)
                plan.order(plan.vacant())
            made += plan.give(step)
        return made

    def put(self, order: SampleOrder, first: int, groups: Sequence[FinishedGroup]) -> None:
        """Take finished groups, the first of which stands there in the order."""
        for place, held in zip(order.places[first : first + len(groups)], groups, strict=True):
            self.plans[order.step].put(order.round, place, held)

    def take(self, step: int) -> StepBatch | None:
        """Return the groups of a step and forget them; None while there is something to wait for or to order."""
        plan = self.plans.get(step)
        if plan is None or len(plan.held) < len(plan.positions) or self._old(step, plan) or self._lacking(plan):
            return None
        del self.plans[step]
        self._first = step + 1
        used: list[FinishedGroup] = []
        wanted = self.demand.prompts_per_step
        for place, held in sorted(plan.held.items()):
            if wanted or not self.demand.filtered:
                used.append(held)
                wanted -= held.signal
            else:
                plan.dropped.append(DroppedGroup(held, SURPLUS, plan.positions[place]))
        return StepBatch(tuple(used), tuple(plan.dropped), plan.refills)

    def _extend(self, plan: StepPlan, groups: int) -> None:
        """Give a plan places for the next prompts of the stream, enough for so many groups."""
        count = math.ceil(groups * self.demand.oversample)
        plan.positions += range(self.position, self.position + count)
        self.position += count

    def _lacking(self, plan: StepPlan) -> int:
        """Return how many groups with a signal a whole plan lacks, if it may still ask for more."""
        if plan.refills >= self.demand.refills:
            return 0
        return max(0, self.demand.prompts_per_step - sum(held.signal for held in plan.held.values()))

    def _old(self, step: int, plan: StepPlan) -> list[int]:
        """Return the places whose groups are too old for their step; an unknown version, -1, is taken for new."""
        oldest = step - self.demand.max_lag
        return [place for place, held in plan.held.items() if 0 <= held.group.oldest_version < oldest]

    def _drop_old(self, step: int, plan: StepPlan) -> None:
        plan.dropped += [
            DroppedGroup(plan.held.pop(place), TOO_OLD, plan.positions[place]) for place in self._old(step, plan)
        ]
