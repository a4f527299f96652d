"""Inputs of a loss function: tensors with one value per trained token of a packed row.

Legend: T all tokens of the mini-batch, R trained tokens of one row that this rank holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.data.columns import COLUMNS, EXTRA
from megatron_rl.data.types import Batch, Loss
from megatron_rl.errors import ConfigError

OptionalInput = Literal[
    "segment_ids_R",
    "clip_low_R",
    "clip_high_R",
    "factors_R",
    "corrections_R",
    "entropy_coefficients_R",
    "rollout_logprobs_R",
    "ref_logprobs_R",
    "old_entropies_R",
]
"""Fields of ``LossInputs`` that may be None."""


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss for the trained tokens of one row, without padding and untrained tokens.

    The tensor ``x_R`` contains the values of the batch column ``x_T`` at those tokens, without gradient. Floating-point
    tensors are float32, or float64 if the log-probabilities are float64.
    """

    old_logprobs_R: Tensor
    """Log-probability under the policy before the update, in nats. Written by ``Policy.compute_logprobs``, or by the
    caller of ``policy_loss``; read by every importance ratio."""
    advantages_R: Tensor
    """Advantage of the token's response. Written by ``Objective.prepare``; read by every cost."""
    weights_R: Tensor
    """Weight of the token in the loss, from global counts. Written by ``Objective.columns``; read by ``make_loss``."""
    response_shares_R: Tensor
    """1 / trained tokens of the response, so that the sum counts responses. Written by ``Objective.prepare``; read by
    the metrics."""
    segment_ids_R: Tensor | None = None
    """int64 in [0, num_segments): tokens with the same id share an importance ratio; None: every token is a segment.
    Written by ``Objective.columns``, renumbered by ``gather``; read by ``segment_ratio``."""
    clip_low_R: Tensor | None = None
    """The ratio may fall to 1 - clip_low. Written by ``Objective.columns``; read by ``clipped``."""
    clip_high_R: Tensor | None = None
    """The ratio may rise to 1 + clip_high. Written by ``Objective.columns``; read by ``clipped``."""
    factors_R: Tensor | None = None
    """Factor of the token's cost, 0 where the objective drops the token; KL and entropy terms keep their weight.
    Written by ``Objective.columns``; read by ``make_loss``."""
    corrections_R: Tensor | None = None
    """Weight that corrects the mismatch of rollout engine and trainer. Written by ``Correction``; read by
    ``make_loss``."""
    entropy_coefficients_R: Tensor | None = None
    """Coefficient of the entropy bonus, the same number at every token. Written by ``EntropyBonus``; read by
    ``make_loss``."""
    rollout_logprobs_R: Tensor | None = None
    """Log-probability that the rollout engine reported, in nats. Written by ``collect``; read by dppo and
    by objectives with the anchor ``rollout``."""
    ref_logprobs_R: Tensor | None = None
    """Log-probability under the frozen reference policy, in nats. Written by the reference pass of the policy; read by
    ``ReferenceKL``."""
    old_entropies_R: Tensor | None = None
    """Entropy of the policy before the update, in nats. Written by ``Policy.compute_logprobs``; the built-in objectives
    read it from the batch, in ``Objective.columns``."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Objective-specific columns by NAME. Written by ``Objective.columns`` as ``extra_NAME_T``; read by ``cost``."""
    num_segments: int = 0
    """Number of segments of the whole row; 0 without ``segment_ids_R``."""
    context_group: ProcessGroup | None = None
    """Process group of the ranks that share the row (context parallelism); None: this rank holds the whole row."""

    @classmethod
    def gather(
        cls,
        batch: Batch,
        positions_R: Tensor | None = None,
        *,
        row_positions_R: Tensor | None = None,
        context_group: ProcessGroup | None = None,
    ) -> "LossInputs":
        """Return the inputs at trained tokens of a batch that has the columns of ``prepare``.

        Args:
            batch: the mini-batch.
            positions_R: int64, positions in T of this rank's tokens; None: all trained tokens.
            row_positions_R: int64, positions in T of the trained tokens of the whole row, whose segments are numbered
                from 0; None: ``positions_R``.
            context_group: process group of the ranks that share the row; None: this rank holds the whole row.

        Raises:
            ConfigError: the batch lacks a column that every loss needs.
        """
        positions_R = batch.trained_R if positions_R is None else positions_R
        columns: dict[str, Any] = {}
        for field_name, column_name in TENSORS.items():
            if column_name in batch:
                columns[field_name] = batch[column_name][positions_R]
            elif field_name not in get_args(OptionalInput):
                missing = COLUMNS[column_name].missing
                raise ConfigError(f"the loss needs the column {column_name}, which the batch lacks: {missing}")
        extra_names = [name for name in batch.columns if name.startswith(EXTRA)]
        extra = {name.removeprefix(EXTRA).removesuffix("_T"): batch[name][positions_R] for name in extra_names}
        num_segments = 0
        if "segment_ids_R" in columns:
            present = batch["segment_ids_T"][positions_R if row_positions_R is None else row_positions_R].unique()
            columns["segment_ids_R"] = torch.searchsorted(present, columns["segment_ids_R"].contiguous())
            num_segments = len(present)
        return cls(**columns, extra=extra, num_segments=num_segments, context_group=context_group)

    def require(self, name: OptionalInput) -> Tensor:
        """Return the optional input ``name``, [R].

        Raises:
            ConfigError: the input is None because the batch has no such column.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            missing = COLUMNS[TENSORS[name]].missing
            raise ConfigError(f"the objective reads {name}, which the batch lacks: {missing}")
        return value

    def columns(self) -> dict[str, Tensor]:
        """Return all tensors by the name of the batch column that they were gathered from, [R] each."""
        tensors = {column_name: getattr(self, field_name) for field_name, column_name in TENSORS.items()}
        extra = {f"{EXTRA}{name}_T": tensor for name, tensor in self.extra.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None} | extra

    def map(self, function: Callable[[Tensor], Tensor]) -> "LossInputs":
        """Return the inputs with ``function`` applied to every tensor, for example to copy them to a device."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        mapped = {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **mapped, extra={name: function(tensor) for name, tensor in self.extra.items()})


TENSORS = {entry.name: f"{entry.name.removesuffix('_R')}_T" for entry in fields(LossInputs) if entry.name[-2:] == "_R"}
"""Name of the batch column of each tensor field of ``LossInputs``."""

LossFn = Callable[[Tensor, Tensor, LossInputs], Loss]
"""A loss function: takes logprobs_R with gradient, entropies_R in nats and the inputs, and returns a ``Loss``."""
