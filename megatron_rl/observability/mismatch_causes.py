"""Why the rollout engine's log-probs differ from the trainer's: size and cause of the gap.

Pure functions on the log-probs of both at this replica's tokens; counts are summed over replicas. Legend: R trained
tokens of this replica.

    not finite       the engine returned NaN or inf
    stale weights    some tokens were sampled by other weights than those that scored them, and the other tokens agree
                     within rounding
    sampling         top_p or top_k truncate the engine's distribution; the trainer models only the temperature, so the
                     engine's log-probs are larger
    quantization     the engine's weights are quantized, and the gap is within the error of that
    routing          engine and trainer chose different experts; known only if the engine returns its choice
    numerics         the gap is within the rounding of the two types
    unexplained      none of these: the engine may have other weights or another model than it reports
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from megatron_rl.algorithms.correction import log_ratio_statistics
from megatron_rl.config.rollout import Sampling
from megatron_rl.config.schema import Run
from megatron_rl.data.minibatch import Minibatch, joined
from megatron_rl.data.types import Batch
from megatron_rl.distributed.replicas import Replicas

ROUNDING: Mapping[str, float] = {
    # megatron-core's router computes its softmax in float32 for every model type.
    "float64": 1e-6,
    # Spacing 1.2e-7 at 1; after tens of layers, logits of 10 to 40 summed in another order differ by about 1e-5.
    # The demo (3 layers) has 3e-7.
    "float32": 1e-4,
    # 8 bits: spacing 4e-3 at 1, so logits of 10 have an error of 0.03 to 0.06; near ties between experts may flip.
    "bfloat16": 0.1,
}
"""Model type -> largest mean absolute difference, in nats, that rounding alone causes with the same weights."""

TAIL = 10.0
"""Largest ratio of the 99th percentile to the bound of the mean that rounding causes."""


@dataclass(frozen=True)
class RoutingDifferences:
    """How often engine and trainer chose different experts.

    Attributes:
        tokens: fraction of tokens with a different choice in any layer.
        layers: fraction of (token, layer) pairs with a different choice.
    """

    tokens: float
    layers: float


TYPICAL_LOGIT = 10.0
"""Size of the logits that decide between tokens; an error of the weights changes them by this fraction."""


@dataclass(frozen=True)
class EngineQuantization:
    """The quantization of the engine's weights.

    Attributes:
        label: the format in words.
        relative_error: norm of the error of a matrix of normal numbers, relative to the norm of the matrix.
    """

    label: str
    relative_error: float

    @property
    def mean_bound(self) -> float:
        """The mean absolute difference of log-probs, in nats, that this error explains."""
        return TYPICAL_LOGIT * self.relative_error


@dataclass(frozen=True)
class MismatchSettings:
    """The settings of engine and trainer that explain differences."""

    engine_dtype: str
    trainer_dtype: str
    sampling: Sampling
    quantization: EngineQuantization | None = None

    @classmethod
    def of(cls, run: Run, quantization: EngineQuantization | None = None) -> "MismatchSettings":
        """Return the settings of a run; without a setting for its type the engine has that of the model."""
        engine = str(run.rollout.sglang.get("dtype", run.rollout.dtype or "auto"))
        return cls(
            engine if engine in ROUNDING else run.model.dtype, run.model.dtype, run.rollout.sampling, quantization
        )

    @property
    def rounding(self) -> float:
        """The mean absolute difference that rounding in the coarser of the two types explains."""
        return max(ROUNDING[self.engine_dtype], ROUNDING[self.trainer_dtype])

    @property
    def truncations(self) -> list[str]:
        """The settings that truncate the engine's distribution, which the trainer does not model."""
        if self.sampling.keep_mask:
            return []
        top_p = [f"top_p = {self.sampling.top_p}"] if self.sampling.top_p < 1 else []
        return top_p + ([f"top_k = {self.sampling.top_k}"] if self.sampling.top_k > 0 else [])


@dataclass(frozen=True)
class Diagnosis:
    """Size and cause of the gap of one step.

    Attributes:
        cause: one of the causes in this module's docstring.
        verdict: one line that describes size and cause.
        gap: percentiles and KL over all trained tokens, from ``log_ratio_statistics``.
        causes: the evidence for and against each cause.
    """

    cause: str
    verdict: str
    gap: Mapping[str, float]
    causes: Mapping[str, object]


@dataclass(frozen=True)
class LogprobGaps:
    """Differences of the log-probs at the trained tokens of this replica's responses.

    Attributes:
        log_R: trainer minus engine log-prob, nats, float64.
        finite_R: whether the engine's log-prob is finite.
        versions_R: weight version that sampled the token, -1 if unknown.
        replicas: the replicas that hold the other tokens.
    """

    log_R: Tensor
    finite_R: Tensor
    versions_R: Tensor
    replicas: Replicas

    @classmethod
    def of(cls, minibatches: Sequence[Minibatch], replicas: Replicas) -> "LogprobGaps":
        """Return the differences of mini-batches that have ``old_logprobs_T``."""
        rollout_R = joined(minibatches, "rollout_logprobs_T")
        log_R = joined(minibatches, "old_logprobs_T").double() - rollout_R.double()
        return cls(log_R, rollout_R.isfinite(), joined(minibatches, "weight_versions_T"), replicas)

    @cached_property
    def statistics(self) -> Mapping[str, float]:
        """``log_ratio_statistics`` of the tokens of all replicas; empty without tokens. The first use is collective."""
        return log_ratio_statistics(self.log_R, self.replicas.sum)

    def fresh_R(self, version: int) -> Tensor:
        """Return where a token was sampled by these weights, or by weights of unknown version, bool."""
        return (self.versions_R == version) | (self.versions_R < 0)


def log_gap(batch: Batch) -> Tensor:
    """Return trainer minus engine log-prob of the trained tokens, [R], float64."""
    trained_R = batch.trained_R
    return batch["old_logprobs_T"][trained_R].double() - batch["rollout_logprobs_T"][trained_R].double()


def diagnose(
    gaps: LogprobGaps, version: int, settings: MismatchSettings, routing: RoutingDifferences | None = None
) -> Diagnosis | None:
    """Return the cause of the gap, the same on every replica; None if no token is trained. Collective.

    Args:
        gaps: the differences at this replica's tokens.
        version: version of the weights that computed the trainer's log-probs.
        settings: types and sampling parameters.
        routing: differences of the chosen experts; None if they are unknown.
    """
    whole = gaps.statistics
    if not whole:
        return None
    fresh_R = gaps.fresh_R(version)
    fresh_log_R = gaps.log_R[fresh_R]
    counted = [(fresh_log_R < 0).sum(), fresh_R.sum(), (~fresh_R).sum(), (~gaps.finite_R).sum()]
    higher, fresh_count, stale_count, not_finite = gaps.replicas.sum(torch.stack(counted)).tolist()
    fresh = (log_ratio_statistics(fresh_log_R, gaps.replicas.sum) or None) if stale_count else whole
    causes = {
        "not_finite": {"tokens": not_finite},
        "stale_weights": _stale(gaps, fresh_R, version, fresh),
        "sampling": {"settings": settings.truncations, "engine_higher": higher / max(fresh_count, 1)},
        "quantization": _describe_quantization(settings.quantization),
        "routing": None if routing is None else {"tokens": routing.tokens, "layers": routing.layers},
        "numerics": {
            "engine": settings.engine_dtype,
            "trainer": settings.trainer_dtype,
            "mean_bound": settings.rounding,
            "p99_bound": TAIL * settings.rounding,
        },
    }
    cause = _cause(causes, whole, fresh, settings)
    return Diagnosis(cause, _verdict(cause, whole, causes, settings), whole, causes)


def _stale(gaps: LogprobGaps, fresh_R: Tensor, version: int, fresh: Mapping[str, float] | None) -> dict[str, object]:
    versions, counts = torch.unique(gaps.versions_R[~fresh_R], return_counts=True)
    found: Counter[int] = Counter()
    for part in cast(list[list[list[int]]], gaps.replicas.gather(torch.stack([versions, counts], 1).tolist())):
        for stale, count in part:
            found[stale] += count
    by_version = {str(stale): found[stale] for stale in sorted(found)}
    return {"tokens": found.total(), "versions": by_version, "scored_by": version, "gap_of_the_others": fresh}


def _describe_stale(stale: object) -> str:
    assert isinstance(stale, dict)
    versions = ", ".join(f"{count} of version {version}" for version, count in stale["versions"].items())
    if stale["gap_of_the_others"] is None:
        return f"older weights sampled every token ({versions}; scored by {stale['scored_by']})"
    return f"older weights sampled some tokens ({versions}; scored by {stale['scored_by']}), the others agree"


def _describe_quantization(quantization: EngineQuantization | None) -> dict[str, object] | None:
    if quantization is None:
        return None
    return {**vars(quantization), "mean_bound": quantization.mean_bound, "p99_bound": TAIL * quantization.mean_bound}


def _is_quantization(found: Mapping[str, float], settings: MismatchSettings) -> bool:
    bound = settings.quantization.mean_bound if settings.quantization else 0.0
    return found["abs_mean"] <= bound and found["abs_p99"] <= TAIL * bound


def _is_rounding(found: Mapping[str, float], settings: MismatchSettings) -> bool:
    return found["abs_mean"] <= settings.rounding and found["abs_p99"] <= TAIL * settings.rounding


def _cause(
    causes: Mapping[str, object],
    whole: Mapping[str, float],
    fresh: Mapping[str, float] | None,
    settings: MismatchSettings,
) -> str:
    if causes["not_finite"] != {"tokens": 0}:
        return "not finite"
    if _is_rounding(whole, settings):
        return "numerics"
    if fresh is None or _is_rounding(fresh, settings):
        return "stale weights"
    if settings.truncations:
        return "sampling"
    if _is_quantization(fresh, settings):
        return "quantization"
    routing = causes["routing"]
    return "routing" if isinstance(routing, dict) and routing["tokens"] > 0 else "unexplained"


def _verdict(cause: str, whole: Mapping[str, float], causes: Mapping[str, object], settings: MismatchSettings) -> str:
    size = f"mean {whole['abs_mean']:.1e}, p99 {whole['abs_p99']:.1e}, max {whole['abs_max']:.1e} nats"
    types = f"{settings.engine_dtype} engine, {settings.trainer_dtype} trainer"
    bound = f"rounding explains a mean of {settings.rounding:.0e}"
    explanations = {
        "not finite": f"the engine returned log-probs that are not finite: {causes['not_finite']}",
        "numerics": f"only rounding ({types}: {bound})",
        "stale weights": _describe_stale(causes["stale_weights"]),
        "sampling": f"{', '.join(settings.truncations)} truncate the engine's distribution, but not the trainer's",
        "quantization": _quantization_verdict(settings.quantization),
        "routing": f"engine and trainer choose different experts: {causes['routing']}",
        "unexplained": f"UNEXPLAINED ({types}: {bound}); the engine may have other weights or settings than it reports",
    }
    return f"mismatch of rollout and trainer: {size}: {explanations[cause]}"


def _quantization_verdict(quantization: EngineQuantization | None) -> str:
    if quantization is None:
        return ""
    error, bound = f"{quantization.relative_error:.1%}", f"{quantization.mean_bound:.1g}"
    return (
        f"the engine's weights are {quantization.label}; their error of {error} explains a mean of up to {bound} nats"
    )
