"""From log-probabilities to the loss: a plain weighted sum of per-token costs, and the numbers that describe it.

Legend: T all tokens of a mini-batch, R trained tokens (of a mini-batch, or those of a micro-batch on this rank).
"""

from collections.abc import Callable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Cost, Objective, Tokens
from megatron_rl.algorithms.segments import segment_means
from megatron_rl.config.section import Section
from megatron_rl.data.types import Batch, Columns, Loss, Metrics, Micro
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError

LossOf = Callable[[Tensor, Tensor, Micro], Loss]
"""(logprobs_R with gradient, entropies_R, micro) -> Loss."""

LARGEST_EXPONENT = 20.0
"""Log ratios are clamped to +-20 before they are exponentiated in estimators of a divergence."""

CAPS = {"tis": 2.0, "mis": 2.0, "icepop": 5.0}


class Correction(Section):
    """Weights against the mismatch between the rollout engine and the trainer: w = exp(old - rollout log-prob).

    The weight multiplies the objective's cost, not the KL term; it has no gradient, and denominators keep the original
    counts.
    """

    kind: Literal["none", "tis", "mis", "icepop", "bypass"] = "none"
    """``tis``: min(w, high); ``mis``: w where low <= w <= high, else 0; ``icepop``: 1 where low <= w <= high, else 0;
    ``bypass``: no weight, the rollout engine's log-probs are used as the old policy's."""
    level: Literal["token", "segment", "sequence"] = "token"
    """What shares a weight: a token, a segment of the objective, or a response."""
    reduction: Literal["product", "geometric"] = "product"
    """How token weights make the weight of a segment or sequence: their product, or their geometric mean."""
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
        """The largest weight in force."""
        return CAPS.get(self.kind, 1.0) if self.high is None else self.high

    def columns(self, tokens: Tokens) -> Columns:
        """Return ``corrections_T``, or nothing where there is no weight."""
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


class ReferenceKL(Section):
    """A penalty for leaving a frozen reference policy, weighted like the objective's tokens."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the penalty; 0 switches it off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log-prob - reference log-prob: ``k1``: d; ``k2``: d^2 / 2; ``k3``: exp(-d) + d - 1."""

    def cost(self, logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
        """Return the estimate of KL(policy || reference) at each token, with gradient; ``k3`` clamps its exponent."""
        log_ratio_R = logprobs_R - ref_logprobs_R
        if self.estimator == "k1":
            return log_ratio_R
        return log_ratio_R.square() / 2 if self.estimator == "k2" else k3(-log_ratio_R)


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(x) - x - 1, the exponent clamped to +-20: at x = log q - log p, sampled from p, an estimate of KL."""
    return torch.expm1(log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)) - log_ratio


def prepare(
    batch: Batch,
    objective: Objective,
    correction: Correction | None = None,
    vocabulary: Vocabulary | None = None,
    segment_ids_T: Tensor | None = None,
) -> Columns:
    """Return every theta-free column that the loss of this global mini-batch reads, computed on whole responses.

    The columns of ``objective.prepare``; ``corrections_T``; with ``bypass`` also ``old_logprobs_T``.

    Args:
        batch: a whole mini-batch: all data-parallel ranks, all micro-batches. It has ``old_logprobs_T`` (or, with
            ``bypass``, ``rollout_logprobs_T``), ``advantages_B`` or ``advantages_T``, ``old_entropies_T`` if asked for.
        objective: gives segments, windows and weights.
        correction: what to do about the engine's mismatch.
        vocabulary: see ``Objective.prepare``.
        segment_ids_T: see ``Objective.prepare``.
    """
    correction = correction or Correction()
    replaced: Columns = {}
    if correction.kind != "none" and "rollout_logprobs_T" not in batch:
        raise ConfigError(f'correction kind "{correction.kind}" needs rollout_logprobs: the batch has none, give them')
    if correction.kind == "bypass":
        replaced = {"old_logprobs_T": batch["rollout_logprobs_T"]}
    batch = batch.add(replaced)
    batch = batch.add(own := objective.prepare(batch, vocabulary, segment_ids_T))
    return {**replaced, **own, **correction.columns(Tokens.of(batch))}


def make_loss(objective: Objective, kl: ReferenceKL | None = None, *, keep_tokens: bool = False) -> LossOf:
    """Return the loss of a micro-batch as a function of what the policy computed for it.

    The value is sum_t weights_t * (corrections_t * cost_t + coefficient * kl_t): values of ranks and micro-batches add
    up to the loss of the mini-batch. Without trained tokens it is 0 with an (empty) gradient. Ratios and sums are in
    float32, or in float64 if the log-probabilities are. With ``keep_tokens`` the metrics hold what became of each
    token: ``new_logprobs_T``, ``log_ratios_T`` (of its segment), ``clipped_T`` (1 or 0).
    """
    kl = kl or ReferenceKL()

    def loss(logprobs_R: Tensor, entropies_R: Tensor, micro: Micro) -> Loss:
        logprobs_R = logprobs_R.to(torch.promote_types(logprobs_R.dtype, torch.float32))
        cost = objective.cost(logprobs_R, micro)
        values_R = cost.values_R
        if "corrections_T" in micro:
            values_R = values_R * micro["corrections_T"]
        if kl.coefficient:
            if "ref_logprobs_T" not in micro:
                raise ConfigError(f"kl.coefficient = {kl.coefficient} needs ref_logprobs: give them, or set it to 0")
            values_R = values_R + kl.coefficient * kl.cost(logprobs_R, micro["ref_logprobs_T"])
        value = (micro["weights_T"] * values_R).sum()
        metrics = _metrics(value, logprobs_R, entropies_R, cost, micro)
        sums = {**metrics.sums, **_gradient_use(value, logprobs_R, micro)}
        return Loss(value, Metrics(sums, metrics.maxima, _tokens(logprobs_R, cost) if keep_tokens else {}))

    return loss


def _gradient_use(value: Tensor, logprobs_R: Tensor, micro: Micro) -> dict[str, Tensor]:
    """Return what became of the gradient with respect to the log-probs; nothing where no gradient is asked for.

    By differentiating: whatever takes a gradient away (a clip, a gate, an advantage or a weight of 0) counts, in any
    objective. What is differentiated twice is the cost of each token alone, not the model.
    """
    if not value.requires_grad:
        return {}
    (gradient_R,) = torch.autograd.grad(value, logprobs_R, retain_graph=True)
    plain_R = micro["weights_T"] * micro["advantages_T"]
    sums = (gradient_R.count_nonzero(), gradient_R.abs().sum(), plain_R.abs().sum())
    return dict(zip(("trained", "gradient", "plain_gradient"), (total.double() for total in sums), strict=True))


def _tokens(logprobs_R: Tensor, cost: Cost) -> Columns:
    logprobs_R = logprobs_R.detach()
    clipped_R = cost.clipped_R.to(logprobs_R.dtype)
    return {"new_logprobs_T": logprobs_R, "log_ratios_T": cost.ratio.log_R, "clipped_T": clipped_R}


@torch.no_grad()
def _metrics(value: Tensor, logprobs_R: Tensor, entropies_R: Tensor, cost: Cost, micro: Micro) -> Metrics:
    """Return sums and maxima over this rank's trained tokens; see ``summary`` for what becomes of them."""
    ratio_R = cost.ratio.value_R
    sums = {
        "loss": value,
        "tokens": torch.ones_like(ratio_R).sum(),
        "responses": micro["response_shares_T"].sum(),
        "segments": cost.ratio.shares_R.sum(),
        "ratio": ratio_R.sum(),
        "clipped": cost.clipped_R.sum(),
        "entropy": entropies_R.sum(),
    }
    if "old_logprobs_T" in micro:
        sums["policy_kl"] = k3(logprobs_R - micro["old_logprobs_T"]).sum()
    if "ref_logprobs_T" in micro:
        sums["reference_kl"] = k3(micro["ref_logprobs_T"] - logprobs_R).sum()
    if "corrections_T" in micro:
        sums["correction"] = micro["corrections_T"].sum()
    largest = ratio_R.max() if len(ratio_R) else ratio_R.new_zeros(())
    return Metrics({name: total.detach().double() for name, total in sums.items()}, {"ratio": largest.double()})


def summary(metrics: Metrics) -> dict[str, float]:
    """Return the journal's numbers for one mini-batch, from metrics added up over all ranks and micro-batches.

    ``loss``: the loss. Means over trained tokens: ``entropy_mean`` (nats, current policy), ``ratio_mean`` (each token
    with the ratio of its segment), ``clipped_fraction`` (tokens that the trust region took out), ``gradient_fraction``
    (tokens with a gradient), ``policy_kl_mean`` (k3 estimate of KL(old || current)), ``reference_kl_mean`` (k3),
    ``correction_mean``. ``gradient_kept``: sum of |dL / d log-prob|, as a share of the plain policy gradient's, which
    has every ratio 1 and nothing clipped. ``ratio_max``: largest ratio of any segment. ``segments_mean``: segments per
    response. ``tokens``, ``responses``, ``segments``: counts.
    """
    sums = {name: float(total) for name, total in metrics.sums.items()}
    # Counts that were added up as shares of 1: whole numbers but for rounding.
    responses, segments = float(round(sums["responses"])), float(round(sums["segments"]))
    tokens = max(sums["tokens"], 1.0)
    means = {"entropy", "ratio", "policy_kl", "reference_kl", "correction"} & sums.keys()
    return {
        "loss": sums["loss"],
        "tokens": sums["tokens"],
        "responses": responses,
        "segments": segments,
        "segments_mean": segments / max(responses, 1.0),
        "clipped_fraction": sums["clipped"] / tokens,
        **(_kept(sums) if "trained" in sums else {}),
        **{f"{name}_mean": sums[name] / tokens for name in sorted(means)},
        **{f"{name}_max": float(largest) for name, largest in metrics.maxima.items()},
    }


def _kept(sums: dict[str, float]) -> dict[str, float]:
    plain = sums["plain_gradient"]
    return {
        "gradient_fraction": sums["trained"] / max(sums["tokens"], 1.0),
        "gradient_kept": sums["gradient"] / plain if plain else 0.0,
    }


def mismatch(batch: Batch) -> dict[str, float]:
    """Return how far the rollout engine's log-probs lie from the trainer's, over the trained tokens of a batch.

    The keys of ``gap``, each after ``mismatch_``. Empty if a side is missing or no token is trained.
    """
    tokens = Tokens.of(batch)
    if "rollout_logprobs_T" not in batch or "old_logprobs_T" not in batch or not len(tokens):
        return {}
    log_R = tokens["old_logprobs_T"].double() - tokens["rollout_logprobs_T"].double()
    return {f"mismatch_{name}": value for name, value in gap(log_R).items()}


def gap(log_R: Tensor) -> dict[str, float]:
    """Return how large the log ratios old / rollout of one token or more are.

    ``kl``: mean k3 estimate of KL(rollout || old), nats a token; ``abs_mean``, ``abs_p50``, ``abs_p90``, ``abs_p99``
    and ``abs_max``: absolute difference in nats.
    """
    # By sorting, not torch.quantile, which refuses more than 16 million values.
    ordered_R = log_R.abs().sort().values
    last = len(ordered_R) - 1
    return {
        "kl": float(k3(log_R).mean()),
        "abs_mean": float(ordered_R.mean()),
        **{f"abs_p{percent}": float(ordered_R[round(percent / 100 * last)]) for percent in (50, 90, 99)},
        "abs_max": float(ordered_R[last]),
    }
