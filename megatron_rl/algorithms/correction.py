"""Importance weights that correct the mismatch between rollout engine and trainer, and metrics of that mismatch.

IcePop keeps the ratio inside its band (GLM-5, arXiv 2602.15763, eq. 1: low = 1/2, high = 2).

Legend: T all tokens of a mini-batch, R trained tokens of a mini-batch.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.gates import Gate, Level, unit_ids
from megatron_rl.algorithms.kl import k3
from megatron_rl.algorithms.percentiles import order_statistics
from megatron_rl.algorithms.segments import segment_means
from megatron_rl.algorithms.tokens import Tokens, Total, only_part
from megatron_rl.config.section import Section
from megatron_rl.data.columns import EXTRA
from megatron_rl.data.types import Batch, Columns
from megatron_rl.errors import ConfigError

CAPS = {"tis": 2.0, "mis": 2.0, "icepop": 5.0, "binary": 5.0}
"""Default of ``Correction.high`` for each kind."""
WEIGHT, OPSM, TRUNCATED = "weight", "opsm", "truncated"
"""Names of the drops of ``Correction`` that are not in ``gates``."""
DROPPED = f"{EXTRA}gate_"
"""Prefix of the columns with 1 at the tokens that a gate drops, else 0."""


class Correction(Section):
    """Importance weights w = exp(old - rollout log-prob) that correct the mismatch of rollout engine and trainer.

    Weight and gates multiply the objective's cost but not the KL term. They have no gradient and do not change the
    token counts in the denominators.
    """

    kind: Literal["none", "tis", "mis", "icepop", "binary", "bypass"] = "none"
    """``tis``: min(w, high); ``mis`` and ``icepop``: w where low <= w <= high, else 0, with different default bounds;
    ``binary``: 1 where low <= w <= high, else 0; ``bypass``: no weight, the rollout engine's log-probs are used as the
    old policy's."""
    level: Level = "token"
    """Unit that gets one weight: a token, a segment of the objective, or a whole response (``sequence``)."""
    reduction: Literal["product", "geometric"] = "product"
    """How token weights are combined into the weight of a segment or sequence: product or geometric mean."""
    low: Annotated[float, Field(gt=0)] = 0.5
    """Smallest accepted weight of ``mis``, ``icepop`` and ``binary``."""
    high: Annotated[float, Field(gt=0)] | None = None
    """Largest weight; none: 2 for ``tis`` and ``mis``, 5 for ``icepop`` and ``binary``."""
    gates: dict[str, Gate] = Field(default_factory=dict)
    """Gates by name, each a table ``[correction.gates.NAME]``; a token trains if all of them keep it."""
    opsm_delta: Annotated[float, Field(ge=0)] | None = None
    """Off-policy sequence mask (DeepSeek-V3.2, arXiv 2512.02556): a response with a negative advantage gets no gradient
    when the mean of old - current log-prob over its tokens exceeds this; none: off. It costs a forward pass per update,
    except for the first of a step."""
    opsm_anchor: Literal["old", "rollout"] = "old"
    """Old policy of ``opsm_delta``: at the start of the step, or the one that sampled, with the engine's log-probs."""
    mask_truncated: bool = False
    """Leave responses that reached the token limit out of the loss, KL and entropy terms included; denominators count
    their tokens."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self._drops_by_weight and self.low > self.cap:
            raise ValueError(f"low = {self.low} exceeds high = {self.cap}: every token would be dropped; raise high")
        return self

    @model_validator(mode="after")
    def _gates_are_usable(self) -> Self:
        for name, gate in self.gates.items():
            if name in (WEIGHT, OPSM, TRUNCATED) or not name.isidentifier():
                raise ValueError(f"gates.{name}: write another name, of letters, digits and underscores")
            if self.kind == "bypass" and gate.policy == "old":
                raise ValueError(
                    f'kind = "bypass" makes every ratio of the old policy 1, so gates.{name} would drop nothing; write'
                    f' gates.{name}.policy = "current"'
                )
        return self

    @property
    def cap(self) -> float:
        """The largest weight: ``high``, or the default of the kind."""
        return CAPS.get(self.kind, 1.0) if self.high is None else self.high

    @property
    def reads_current_logprobs(self) -> bool:
        """Whether ``columns`` reads ``current_logprobs_T``, as ``Objective.reads_current_logprobs``."""
        return self.opsm_delta is not None or any(gate.policy == "current" for gate in self.gates.values())

    @property
    def reads_rollout_logprobs(self) -> bool:
        """Whether the log-probs of the rollout engine are needed."""
        by_opsm = self.opsm_delta is not None and self.opsm_anchor == "rollout"
        return self.kind != "none" or bool(self.gates) or by_opsm

    @property
    def _drops_by_weight(self) -> bool:
        return self.kind in ("mis", "icepop", "binary")

    def columns(self, tokens: Tokens) -> Columns:
        """Return the columns ``corrections_T`` and, for everything that drops tokens, ``extra_gate_NAME_T``.

        The result is empty if there is neither a weight nor a gate. If the objective has no segments, ``level =
        "segment"`` gives one weight per token. Tokens left out by ``mask_truncated`` have ``weights_T`` 0 instead.

        Raises:
            ConfigError: ``mask_truncated`` and the batch does not say which responses are truncated.
        """
        weights_R = None if self.kind in ("none", "bypass") else self._weights(tokens)
        drops = {name: gate.drops(tokens) for name, gate in self.gates.items()}
        if self._drops_by_weight and weights_R is not None:
            drops[WEIGHT] = weights_R == 0
        if self.opsm_delta is not None:
            drops[OPSM] = self._opsm(tokens, self.opsm_delta)
        factors_R = tokens.constant(1.0) if weights_R is None else weights_R
        for dropped_R in drops.values():
            factors_R = torch.where(dropped_R, 0.0, factors_R)
        columns = {"corrections_T": factors_R} if drops or weights_R is not None else {}
        if self.mask_truncated:
            drops[TRUNCATED] = truncated_R = self._truncated(tokens)
            columns["weights_T"] = torch.where(truncated_R, 0.0, tokens["weights_T"].double())
        columns |= {f"{DROPPED}{name}_T": dropped_R.double() for name, dropped_R in drops.items()}
        return {name: tokens.spread(values_R) for name, values_R in columns.items()}

    def _weights(self, tokens: Tokens) -> Tensor:
        log_R = tokens["old_logprobs_T"].double() - tokens["rollout_logprobs_T"].double()
        if (ids_R := unit_ids(tokens, self.level)) is not None:
            means_R, sizes_R = segment_means(log_R, ids_R)
            log_R = means_R if self.reduction == "geometric" else means_R * sizes_R
        weights_R = log_R.clamp(max=torch.tensor(self.cap, dtype=torch.float64).log().item()).exp()
        if self.kind == "tis":
            return weights_R
        inside_R = (log_R.exp() >= self.low) & (log_R.exp() <= self.cap)
        return torch.where(inside_R, 1.0 if self.kind == "binary" else weights_R, 0.0)

    def _opsm(self, tokens: Tokens, delta: float) -> Tensor:
        """Return which tokens the off-policy sequence mask drops, bool [R]."""
        old_R = tokens["rollout_logprobs_T" if self.opsm_anchor == "rollout" else "old_logprobs_T"].double()
        gap_R = segment_means(old_R - tokens["current_logprobs_T"].double(), tokens.responses_R)[0]
        return (tokens.advantages_R < 0) & (gap_R > delta)

    def _truncated(self, tokens: Tokens) -> Tensor:
        if "truncated_B" not in tokens.batch:
            raise ConfigError(
                "correction.mask_truncated = true needs truncated_B, which the batch lacks: outside of the trainer,"
                " write false, and leave truncated responses out of loss_mask"
            )
        return tokens.batch["truncated_B"][tokens.responses_R]


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
