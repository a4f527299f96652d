"""Data of a training step that rollout and policy pass to the recorder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RecordedSample:
    """A response with its prompt, as records show it."""

    id: str
    prompt_id: str
    prompt: str
    text: str
    output_ids: Sequence[int]


ReadSamples = Callable[[Sequence[int]], Sequence[RecordedSample]]
"""Returns the samples of the newest step with these indices (``sample_index_B``)."""


@dataclass(frozen=True)
class StepSamples:
    """The recorded samples of a step; empty on all ranks except the main rank.

    Attributes:
        output_tokens: the output tokens of each sample, in the order of ``sample_index_B``.
        read: reads samples by their index; they stay in the process that sampled them.
        lines: the text to append to ``rollouts.jsonl``, a line per response; empty if ``log.rollouts`` is false.
        ledger: the text to append to ``ledger.jsonl``, a line per group.
        counts: metrics that cannot be computed from the batch, by key of ``metrics.jsonl``.
    """

    output_tokens: Sequence[int] = ()
    read: ReadSamples = lambda indices: ()
    lines: str = ""
    ledger: str = ""
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
