"""Groups in the order in which they finish, so that one long response does not hold a step.

A step takes the first ``prompts_per_step`` groups that are finished, whatever their prompts. A group that is not
finished stays in progress for a later step, and counts against the limit of ``(max_lag + 1) * prompts_per_step``
groups. The bound on staleness is hard: a group with a token of a version below ``step - max_lag`` is dropped and
counted, and its prompt is requested again. Batches are biased toward short responses; the last step takes or drops
every group, so that each is accounted for.

Like ``buffer.Buffer``, this is plain data without threads or clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rl.rollout.buffer import (
    SURPLUS,
    TOO_OLD,
    BufferConfig,
    DroppedGroup,
    FinishedGroup,
    SampleOrder,
    StepBatch,
)


@dataclass
class CompletedGroup:
    """A finished group that no step has taken."""

    position: int
    """Position of its prompt in the stream."""
    finished: FinishedGroup
    is_replaced: bool = False
    """Whether another prompt was requested in its place, because it has no signal."""


@dataclass
class CompletionBuffer:
    """The groups in progress and finished, in order of completion."""

    config: BufferConfig
    next_position: int = 0
    """Position in the stream of the next prompt."""
    next_step: int = 0
    """The first step that has not taken its groups."""
    rounds: int = 0
    """Number of orders so far."""
    replacements: int = 0
    """Groups without a signal that were replaced for the next step."""
    orders_in_progress: dict[int, SampleOrder] = field(default_factory=dict)
    """Round -> order, with the groups that are still missing."""
    completed: list[CompletedGroup] = field(default_factory=list)
    dropped: list[DroppedGroup] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    """Positions of prompts whose groups were too old."""
    submitted: set[int] = field(default_factory=set)
    """Rounds whose orders were returned by ``orders``; not saved."""

    @property
    def pending(self) -> int:
        """Number of groups in progress."""
        return sum(len(order.missing) for order in self.orders_in_progress.values())

    @property
    def finished_groups(self) -> list[FinishedGroup]:
        """The finished groups."""
        return [entry.finished for entry in self.completed]

    @property
    def steps(self) -> int:
        """Number of steps for which groups are sampled."""
        return -(-(self.pending + len(self.completed)) // self.config.prompts_per_step)

    def orders(self, version: int) -> list[SampleOrder]:
        """Return what to request from the fleet now that it has weights of this version; returns each order once."""
        step = max(version, self.next_step)
        self._drop_old(step)
        self._replace_without_signal()
        last = min(version + self.config.max_lag, self.config.steps - 1)
        counted = self.pending + sum(not entry.is_replaced for entry in self.completed)
        missing = (last - self.next_step + 1) * self.config.prompts_per_step - counted
        if missing > 0:
            repeated, self.repeats = self.repeats[:missing], self.repeats[missing:]
            count = missing - len(repeated)
            positions = (*repeated, *range(self.next_position, self.next_position + count))
            self.next_position += count
            indices = tuple(range(missing))
            self.orders_in_progress[self.rounds] = SampleOrder(step, self.rounds, positions, indices, indices)
            self.rounds += 1
        new = [order for number, order in self.orders_in_progress.items() if number not in self.submitted]
        self.submitted.update(order.round for order in new)
        return new

    def put(self, order: SampleOrder, first: int, groups: Sequence[FinishedGroup]) -> None:
        """Store finished groups of an order, unless they are not missing: a repeated order may bring extra groups."""
        current = self.orders_in_progress.get(order.round)
        for index, finished in enumerate(groups, start=first):
            if current is not None and index in current.missing:
                missing = tuple(other for other in current.missing if other != index)
                current = SampleOrder(order.step, order.round, order.positions, order.slots, missing)
                self.completed.append(CompletedGroup(order.positions[index], finished))
        if current is not None and current.missing:
            self.orders_in_progress[order.round] = current
        else:
            self.orders_in_progress.pop(order.round, None)

    def take(self, step: int) -> StepBatch | None:
        """Remove and return the groups of a step; None while too few are finished."""
        self._drop_old(step)
        is_last = step == self.config.steps - 1
        needed, count = self.config.prompts_per_step, 0
        for entry in self.completed:
            if not needed:
                break
            needed -= not entry.is_replaced
            count += 1
        if needed or (is_last and (self.pending or self.repeats)):
            return None
        used, self.completed = self.completed[:count], self.completed[count:]
        if is_last:
            self.dropped += [DroppedGroup(entry.finished, SURPLUS, entry.position) for entry in self.completed]
            self.completed = []
        rounds = -(-self.replacements // self.config.prompts_per_step)
        batch = StepBatch(tuple(entry.finished for entry in used), tuple(self.dropped), rounds)
        self.dropped.clear()
        self.replacements, self.next_step = 0, step + 1
        return batch

    def _drop_old(self, step: int) -> None:
        """Drop finished groups that are too old for a step; an unknown version (-1) counts as new."""
        oldest = step - self.config.max_lag
        for entry in list(self.completed):
            if 0 <= entry.finished.group.oldest_version < oldest:
                self.dropped.append(DroppedGroup(entry.finished, TOO_OLD, entry.position))
                self.repeats.append(entry.position)
        self.completed = [e for e in self.completed if not 0 <= e.finished.group.oldest_version < oldest]

    def _replace_without_signal(self) -> None:
        """Mark finished groups without a signal as replaced, as far as ``max_resample_rounds`` allows."""
        limit = self.config.max_resample_rounds * self.config.prompts_per_step
        for entry in self.completed:
            is_useless = self.config.filter_zero_variance and not entry.is_replaced and not entry.finished.has_signal
            if is_useless and self.replacements < limit:
                entry.is_replaced = True
                self.replacements += 1
