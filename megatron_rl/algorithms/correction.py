"""Importance weights that correct the mismatch between rollout engine and trainer, and metrics of that mismatch.

Legend: T all tokens of a mini-batch, R trained tokens of a mini-batch.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.kl import k3
from megatron_rl.algorithms.objectives.base import Tokens, Total, only_part
from megatron_rl.algorithms.percentiles import order_statistics
from megatron_rl.algorithms.segments import segment_means
from megatron_rl.config.section import Section
from megatron_rl.data.types import Batch, Columns

CAPS = {"tis": 2.0, "mis": 2.0, "icepop": 5.0}
"""Default of ``Correction.high`` for each kind."""


class Correction(Section):
    """Importance weights w = exp(old - rollout log-prob) that correct the mismatch of rollout engine and trainer.

    The weight multiplies the objective's cost but not the KL term. It has no gradient and does not change the token
    counts in the denominators.
    """

    kind: Literal["none", "tis", "mis", "icepop", "bypass"] = "none"
    """``tis``: min(w, high); ``mis``: w where low <= w <= high, else 0; ``icepop``: 1 where low <= w <= high, else 0;
    ``bypass``: no weight, the rollout engine's log-probs are used as the old policy's."""
    level: Literal["token", "segment", "sequence"] = "token"
    """Unit that gets one weight: a token, a segment of the objective, or a whole response (``sequence``)."""
    reduction: Literal["product", "geometric"] = "product"
    """How token weights are combined into the weight of a segment or sequence: product or geometric mean."""
    low: Annotated[float, Field(gt=0)] = 0.5
    """Smallest accepted weight of ``mis`` and ``icepop``."""
    high: Annotated[float, Field(gt=0)] | None = None
    """Largest weight; none: 2 for ``tis`` and ``mis``, 5 for ``icepop``."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.kind in ("mis", "icepop") and self.low > self.cap:
            raise ValueError(f"low = {self.low} exceeds high = {self.cap}: every token would be dropped; raise high")
        return self

    @property
    def cap(self) -> float:
        """The largest weight: ``high``, or the default of the kind."""
        return CAPS.get(self.kind, 1.0) if self.high is None else self.high

    def columns(self, tokens: Tokens) -> Columns:
        """Return the column ``corrections_T``; empty for the kinds ``none`` and ``bypass``.

        If the objective has no segments, ``level = "segment"`` gives one weight per token.
        """
        if self.kind in ("none", "bypass"):
            return {}
        log_R = tokens["old_logprobs_T"].double() - tokens["rollout_logprobs_T"].double()
        ids_R = tokens.responses_R
        if self.level == "segment" and "segment_ids_T" in tokens.batch:
            ids_R = tokens["segment_ids_T"]
        elif self.level == "segment":
            ids_R = torch.arange(len(tokens))
        if self.level != "token":
            means_R, sizes_R = segment_means(log_R, ids_R)
            log_R = means_R if self.reduction == "geometric" else means_R * sizes_R
        weights_R = log_R.clamp(max=torch.tensor(self.cap).double().log().item()).exp()
        if self.kind != "tis":
            inside_R = (log_R.exp() >= self.low) & (log_R.exp() <= self.cap)
            weights_R = torch.where(inside_R, weights_R if self.kind == "mis" else 1.0, 0.0)
        return {"corrections_T": tokens.spread(weights_R)}


def mismatch(batch: Batch) -> dict[str, float]:
    """Return statistics of the difference between trainer and rollout log-probs over the trained tokens of a batch.

    The keys are those of ``log_ratio_statistics`` with the prefix ``mismatch_``. The result is empty if the batch has
    no rollout log-probs, no old log-probs, or no trained tokens.
    """
    tokens = Tokens.of(batch)
    if "rollout_logprobs_T" not in batch or "old_logprobs_T" not in batch:
        return {}
    log_R = tokens["old_logprobs_T"].double() - tokens["rollout_logprobs_T"].double()
    return {f"mismatch_{name}": value for name, value in log_ratio_statistics(log_R).items()}


def log_ratio_statistics(log_R: Tensor, total: Total = only_part) -> dict[str, float]:
    """Return statistics of log ratios (old minus rollout log-prob, in nats); empty without tokens.

    ``kl``: mean k3 estimate of KL(rollout || old) in nats per token; ``abs_mean``, ``abs_p50``, ``abs_p90``,
    ``abs_p99`` and ``abs_max``: mean, percentiles and maximum of the absolute log ratio in nats.

    Args:
        log_R: log ratios, float64: all, or one part of them.
        total: adds a tensor over all parts; the statistics are those of all parts together.
    """
    count = int(total(torch.tensor(len(log_R))))
    if not count:
        return {}
    size_R = log_R.abs()
    sums = total(torch.stack([k3(log_R).sum(), size_R.sum()]))
    kl, mean = (sums / count).tolist()
    names = {"abs_p50": 50, "abs_p90": 90, "abs_p99": 99, "abs_max": 100}
    values = order_statistics(size_R, [round(percent / 100 * (count - 1)) for percent in names.values()], total)
    return {"kl": kl, "abs_mean": mean, **dict(zip(names, values, strict=True))}
