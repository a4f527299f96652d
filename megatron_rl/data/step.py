"""Data of a training step that rollout and policy pass to the recorder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.data.types import Group


@dataclass(frozen=True)
class StepSamples:
    """The recorded samples of a step; empty on all ranks except the main rank.

    Attributes:
        groups: all groups of the step, those in the batch first; ``sample_index_B`` is an index into their responses.
        lines: lines of ``rollouts.jsonl``, one per response; empty if ``log.rollouts`` is false.
        ledger: lines of ``ledger.jsonl``, one per group.
        counts: metrics that cannot be computed from the batch, by key of ``metrics.jsonl``.
    """

    groups: Sequence[Group] = ()
    lines: Sequence[Mapping[str, object]] = ()
    ledger: Sequence[Mapping[str, object]] = ()
    counts: Mapping[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """Result of one optimizer step.

    Attributes:
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
    """

    grad_norm: float
    lr: float
