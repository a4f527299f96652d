"""Gates: tokens, segments or responses that are too far from the rollout policy get no gradient.

A gate compares a measure of the gap between the rollout policy mu and the trainer's policy pi with bounds. It drops the
cost of a unit (token, segment, response) outside of them, and is separate from the weight of ``Correction``: verl,
NeMo-RL, OpenRLHF and trl combine a gate on responses with a weight per token. MIS-PO (arXiv 2602.10604) has two gates
and no weight. Denominators count dropped tokens.

Legend: R trained tokens of a mini-batch or of a part of it.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.kl import binary_kl, binary_tv, k3
from megatron_rl.algorithms.segments import segment_means
from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.config.section import Section

Level = Literal["token", "segment", "sequence"]


class Gate(Section):
    """Drop the cost of units whose gap between trainer and rollout engine is outside of bounds."""

    level: Level = "sequence"
    """Unit that is kept or dropped: a token, a segment of the objective, or a whole response (``sequence``)."""
    measure: Literal["ratio", "kl", "tv", "k3"] = "ratio"
    """Gap of a token: ``ratio`` pi / mu; ``kl`` and ``tv`` KL(mu || pi) and total variation of the event "this token or
    any other"; ``k3`` estimate of KL(mu || pi). mu is the rollout engine's probability, pi the trainer's."""
    reduction: Literal["product", "geometric", "mean", "max"] | None = None
    """Value of a unit: ``product`` or ``geometric`` mean of ratios, ``mean`` of the others, or ``max``, where each
    token must be within the bounds; none: ``geometric`` for ``ratio``, else ``mean``."""
    policy: Literal["old", "current"] = "old"
    """pi: ``old``, the policy at the start of the step; ``current``, that at the start of the update, which costs a
    forward pass per update except for the first of a step."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Smallest value that is kept; none: no bound."""
    high: Annotated[float, Field(gt=0)] | None = None
    """Largest value that is kept; none: no bound."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("the gate has no bound and keeps everything: set low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low} exceeds high = {self.high}: everything would be dropped; swap them")
        return self

    @model_validator(mode="after")
    def _reduction_fits_the_measure(self) -> Self:
        choices = ("product", "geometric", "max") if self.measure == "ratio" else ("mean", "max")
        if self.reduction not in (None, *choices):
            listed = " or ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f'reduction = "{self.reduction}" does not fit measure = "{self.measure}": write {listed}')
        return self

    def drops(self, tokens: Tokens) -> Tensor:
        """Return which trained tokens are dropped, bool [R]; bounds are inclusive."""
        policy = tokens["current_logprobs_T" if self.policy == "current" else "old_logprobs_T"].double()
        rollout_R = tokens["rollout_logprobs_T"].double()
        if self.measure == "kl":
            values_R = binary_kl(rollout_R, policy)
        elif self.measure == "tv":
            values_R = binary_tv(rollout_R, policy)
        else:
            values_R = policy - rollout_R
            values_R = k3(values_R) if self.measure == "k3" else values_R
        ids_R = unit_ids(tokens, self.level)
        if self.reduction == "max":
            outside_R = self._outside(values_R)
            return outside_R if ids_R is None else segment_means(outside_R.double(), ids_R)[0] > 0
        if ids_R is not None:
            means_R, sizes_R = segment_means(values_R, ids_R)
            values_R = means_R * sizes_R if self.reduction == "product" else means_R
        return self._outside(values_R)

    def _outside(self, values_R: Tensor) -> Tensor:
        values_R = values_R.exp() if self.measure == "ratio" else values_R
        outside_R = torch.zeros_like(values_R, dtype=torch.bool)
        if self.low is not None:
            outside_R |= values_R < self.low
        return outside_R if self.high is None else outside_R | (values_R > self.high)


def unit_ids(tokens: Tokens, level: Level) -> Tensor | None:
    """Return the unit of each trained token, int64 [R]; None if every token is one.

    Without segments of the objective, the level ``segment`` is that of tokens.
    """
    if level == "sequence":
        return tokens.responses_R
    return tokens["segment_ids_T"] if level == "segment" and "segment_ids_T" in tokens.batch else None
