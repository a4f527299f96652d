"""Records of a step: plain data that rollout and policy hand to the recorder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.data.types import Group


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step, as they are recorded; empty on all ranks but the main one.

    Attributes:
        groups: all groups of the step, those of its batch first; ``sample_index_B`` counts their responses.
        lines: lines of ``rollouts.jsonl``, one per response; empty if ``log.rollouts`` is off.
        ledger: lines of ``ledger.jsonl``, one per group.
        counts: metrics that cannot be computed from the batch, by their key in ``metrics.jsonl``.
    """

    groups: Sequence[Group] = ()
    lines: Sequence[Mapping[str, object]] = ()
    ledger: Sequence[Mapping[str, object]] = ()
    counts: Mapping[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did: the global gradient norm before clipping, and the learning rate."""

    grad_norm: float
    lr: float
