"""Why the rollout engine's log-probs differ from the trainer's: how far, on which tokens, and from what cause.

Pure functions on a scored batch. Legend: T tokens of the batch, R trained tokens.

A cause is told apart by what is known without running anything again:

    not finite       the engine returned NaN or inf
    stale weights    tokens sampled by another version of the weights than the one that scored them; the cause if the
                     other tokens agree within rounding
    sampling         top_p or top_k cut the distribution that the engine sampled from; the trainer models temperature
                     alone. The engine's log-probs are then the larger ones
    routing          engine and trainer sent tokens to other experts; known only where the engine returns its choice
    numerics         all of it is within what the two types round to
    unexplained      none of these: the engine may hold other weights or another model than it says
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.correction import log_ratio_statistics
from megatron_rl.config.schema import Run, Sampling
from megatron_rl.data.types import Batch

ROUNDING: Mapping[str, float] = {
    # megatron-core's router takes its softmax in float32 whatever the type of the model.
    "float64": 1e-6,
    # Spacing 1.2e-7 at 1; logits of 10 to 40 after tens of layers, in another order of summation, differ by some 1e-5.
    # The demo (3 layers) has 3e-7.
    "float32": 1e-4,
    # 8 bits: spacing 4e-3 at 1, so logits of 10 are known to 0.03 to 0.06; a near tie between two experts may flip.
    "bfloat16": 0.1,
}
"""Mean absolute difference, in nats, up to which two runs of the same weights differ by rounding alone."""

TAIL = 10.0
"""The 99th percentile may be this many times the mean's bound: rounding has no heavier tail than that."""


@dataclass(frozen=True)
class Routing:
    """How often engine and trainer chose other experts, where the engine returns its choice.

    Attributes:
        tokens: share of trained tokens with a different choice in any layer.
        layers: share of (token, layer) pairs with a different choice.
    """

    tokens: float
    layers: float


@dataclass(frozen=True)
class Settings:
    """What the two sides were told to do."""

    engine_dtype: str
    trainer_dtype: str
    sampling: Sampling

    @classmethod
    def of(cls, run: Run) -> "Settings":
        """Return the settings of a run; an engine that we did not start has the type given for it, or the model's."""
        engine = str(run.rollout.sglang.get("dtype", run.rollout.dtype or "auto"))
        return cls(engine if engine in ROUNDING else run.model.dtype, run.model.dtype, run.rollout.sampling)

    @property
    def rounding(self) -> float:
        """The mean absolute difference that the coarser of the two types explains."""
        return max(ROUNDING[self.engine_dtype], ROUNDING[self.trainer_dtype])

    @property
    def cuts(self) -> list[str]:
        """The sampling settings that the trainer does not model."""
        top_p = [f"top_p = {self.sampling.top_p}"] if self.sampling.top_p < 1 else []
        return top_p + ([f"top_k = {self.sampling.top_k}"] if self.sampling.top_k > 0 else [])


@dataclass(frozen=True)
class Diagnosis:
    """What is known about the gap of one step.

    Attributes:
        cause: one of those in the head of this file.
        verdict: a line for people.
        gap: percentiles and KL over all trained tokens, as of ``loss.gap``.
        causes: what speaks for and against each cause.
    """

    cause: str
    verdict: str
    gap: Mapping[str, float]
    causes: Mapping[str, object]


def log_gap(batch: Batch) -> Tensor:
    """Return trainer minus engine log-prob of the trained tokens, [R], float64."""
    trained_R = batch.trained_R
    return batch["old_logprobs_T"][trained_R].double() - batch["rollout_logprobs_T"][trained_R].double()


def diagnose(batch: Batch, version: int, settings: Settings, routing: Routing | None = None) -> Diagnosis | None:
    """Return what the gap comes from; None where no token is trained.

    Args:
        batch: has ``old_logprobs_T``, ``rollout_logprobs_T`` and ``weight_versions_T``.
        version: of the weights that scored it.
        settings: types and sampling.
        routing: where the engine returned the experts it chose.
    """
    log_R = log_gap(batch)
    if not len(log_R):
        return None
    finite_R = batch["rollout_logprobs_T"][batch.trained_R].isfinite()
    versions_R = batch["weight_versions_T"][batch.trained_R]
    fresh_R = (versions_R == version) | (versions_R < 0)
    whole = log_ratio_statistics(log_R)
    fresh = log_ratio_statistics(log_R[fresh_R]) if bool(fresh_R.any()) else None
    higher = float((log_R[fresh_R] < 0).double().mean()) if fresh else 0.0
    causes = {
        "not_finite": {"tokens": int((~finite_R).sum())},
        "stale_weights": _stale(versions_R, fresh_R, version, fresh),
        "sampling": {"settings": settings.cuts, "engine_higher": higher},
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


def _stale(versions_R: Tensor, fresh_R: Tensor, version: int, fresh: Mapping[str, float] | None) -> dict[str, object]:
    stale_R = versions_R[~fresh_R]
    found = {str(int(v)): int((stale_R == v).sum()) for v in torch.unique(stale_R)}
    return {"tokens": len(stale_R), "versions": found, "scored_by": version, "gap_of_the_others": fresh}


def _stale_words(stale: object) -> str:
    assert isinstance(stale, dict)
    versions = ", ".join(f"{count} of version {version}" for version, count in stale["versions"].items())
    if stale["gap_of_the_others"] is None:
        return f"older weights sampled every token ({versions}; scored by {stale['scored_by']})"
    return f"older weights sampled some tokens ({versions}; scored by {stale['scored_by']}), the others agree"


def _is_rounding(found: Mapping[str, float], settings: Settings) -> bool:
    return found["abs_mean"] <= settings.rounding and found["abs_p99"] <= TAIL * settings.rounding


def _cause(
    causes: Mapping[str, object], whole: Mapping[str, float], fresh: Mapping[str, float] | None, settings: Settings
) -> str:
    if causes["not_finite"] != {"tokens": 0}:
        return "not finite"
    if _is_rounding(whole, settings):
        return "numerics"
    if fresh is None or _is_rounding(fresh, settings):
        return "stale weights"
    if settings.cuts:
        return "sampling"
    routing = causes["routing"]
    return "routing" if isinstance(routing, dict) and routing["tokens"] > 0 else "unexplained"


def _verdict(cause: str, whole: Mapping[str, float], causes: Mapping[str, object], settings: Settings) -> str:
    size = f"mean {whole['abs_mean']:.1e}, p99 {whole['abs_p99']:.1e}, max {whole['abs_max']:.1e} nats"
    types = f"{settings.engine_dtype} engine, {settings.trainer_dtype} trainer"
    bound = f"rounding explains a mean of {settings.rounding:.0e}"
    said = {
        "not finite": f"the engine returned log-probs that are not finite: {causes['not_finite']}",
        "numerics": f"only rounding ({types}: {bound})",
        "stale weights": _stale_words(causes["stale_weights"]),
        "sampling": f"{', '.join(settings.cuts)} cut the engine's distribution, which the trainer does not model",
        "routing": f"engine and trainer choose other experts: {causes['routing']}",
        "unexplained": f"UNEXPLAINED ({types}: {bound}); the engine may hold other weights or settings than it says",
    }
    return f"mismatch of rollout and trainer: {size}: {said[cause]}"
