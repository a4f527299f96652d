"""The plan: which trainer rank sends which rectangle of which parameter to which engine rank.

Replicas of the trainer share the work: a rectangle that several ranks hold is cut into strips, and each strip is sent
by the rank that has the least to send so far. Ranks of one pipeline stage then send about the same; stages differ as
their layers do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.models.reshard.boxes import Box, common
from megatron_rl.models.reshard.engine import engine_boxes
from megatron_rl.models.reshard.layouts import EngineLayout, TrainerLayout
from megatron_rl.models.reshard.trainer import trainer_boxes

_MIN_STRIP_ELEMENTS = 1 << 12
"""A smaller rectangle is sent by one rank."""


@dataclass(frozen=True)
class Transfer:
    """A rectangle of a tensor on its way from a shard to an engine's parameter.

    Attributes:
        name: Hugging Face name of the tensor.
        source: the rectangle in the sender's parameter; its one rank sends.
        target: the same rectangle in the receiver's parameter; its one rank receives.
    """

    name: str
    source: Box
    target: Box


@dataclass(frozen=True)
class ReshardPlan:
    """All transfers of a push to one engine.

    Attributes:
        transfers: rectangles; each element of each engine parameter is in exactly one.
        sent: elements that each trainer rank sends.
        received: elements that each engine rank receives.
    """

    transfers: Sequence[Transfer]
    sent: Sequence[int]
    received: Sequence[int]

    def imbalance(self, ranks_per_stage: int) -> float:
        """Return the largest number of elements that a rank sends, relative to the mean of its pipeline stage."""
        stages = [self.sent[i : i + ranks_per_stage] for i in range(0, len(self.sent), ranks_per_stage)]
        return max(max(stage) * len(stage) / sum(stage) for stage in stages)


def reshard_plan(family: Family, trainer: TrainerLayout, engine: EngineLayout) -> ReshardPlan:
    """Return the plan of a push from a trainer to one engine.

    Raises:
        DataError: a layout does not fit the model, or a tensor is of a kind that cannot be planned.
    """
    sent, received = [0] * trainer.ranks, [0] * engine.tensor
    rectangles: list[tuple[str, Box, Box]] = []
    needs = dict(engine_boxes(family, engine))
    for name, holdings in trainer_boxes(family, trainer):
        for target in needs[name]:
            for source in holdings:
                rows, columns = common(source.rows, target.rows), common(source.columns, target.columns)
                if rows and columns:
                    rectangles.append((name, source.cut(rows, columns), target.cut(rows, columns)))
    # The few choices first: a rectangle with one holder; then from large to small, so that small ones fill the gaps.
    rectangles.sort(key=lambda entry: (len(entry[1].ranks) > 1, -entry[1].elements))
    transfers: list[Transfer] = []
    for name, source, target in rectangles:
        strips = min(len(source.ranks), max(1, source.elements // _MIN_STRIP_ELEMENTS))
        for part in source.strips(strips):
            rank = min(part.ranks, key=lambda r: (sent[r], r))
            sent[rank] += part.elements
            received[target.ranks[0]] += part.elements
            whole = Box(part.rows, part.columns, part.parameter, part.row, part.column, (rank,))
            transfers.append(Transfer(name, whole, target.cut(part.rows, part.columns)))
    return ReshardPlan(transfers, sent, received)
