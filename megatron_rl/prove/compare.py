"""Differences of a layout's step from the reference, the same step on one rank in float64, and their tolerances."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that count as rounding error.

    Attributes:
        scores: log-probs and entropies in nats, relative to max(1, |value|), because rounding grows with the logits.
        loss: loss, relative to max(1, |loss|).
        gradient: norm of the difference of a parameter's gradient, relative to the norm of the gradient.
        norm: gradient norm as megatron-core computes it, relative.
        ratio: mean and largest segment ratio, absolute.
    """

    scores: float
    loss: float
    gradient: float
    norm: float
    ratio: float


TOLERANCES: Mapping[str, Tolerance] = {
    # megatron-core's router computes its softmax in float32 for any model dtype: an error of 6e-8 per layer.
    "float64": Tolerance(scores=1e-6, loss=1e-6, gradient=1e-5, norm=1e-6, ratio=1e-6),
    # float32 has spacing 1.2e-7: logits of size 10 after a few layers have errors near 1e-6, gradients ten times that.
    # A trained model gives random tokens log-probs near -30 from logits near 40 (spacing 4e-6, summed over layers).
    # Such errors add up over a response in the weight of VESPO: its loss then differs by 1.3e-5, its ratio by 1.3e-4.
    "float32": Tolerance(scores=5e-5, loss=2e-5, gradient=5e-4, norm=1e-4, ratio=2e-4),
    # bfloat16 has 8 bits: spacing 4e-3 at 1, and routing may change. Only gross errors exceed rounding.
    "bfloat16": Tolerance(scores=1.0, loss=0.1, gradient=0.5, norm=0.2, ratio=0.5),
}


@dataclass(frozen=True)
class Differences:
    """The largest differences of one objective under one layout."""

    logprobs: float
    entropies: float
    loss: float
    gradient: float
    gradient_absolute: float
    worst: str
    norm: float
    ratio: float
    counts: float
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all differences are within the tolerance."""
        return not self.reasons

    def record(self) -> dict[str, object]:
        """Return the entry of ``prove.json``."""
        return asdict(self) | {"holds": self.passed}


def differences(
    ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], objective: str, tolerance: Tolerance
) -> Differences:
    """Compare the results of one objective, as written by ``prove.rank``."""

    def metric(results: Mapping[str, Tensor], name: str) -> float:
        return float(results[f"{objective}/metric.{name}"])

    def difference(name: str) -> float:
        return abs(metric(ours, name) - metric(reference, name))

    prefix = f"{objective}/gradient."
    names = [name for name in reference if name.startswith(prefix)]
    missing = sorted(set(names) ^ {name for name in ours if name.startswith(prefix)})
    relative = {name: _relative(ours[name], reference[name]) for name in names if name in ours}
    worst = max(relative, key=lambda name: relative[name])
    absolute = max(float((ours[name].double() - reference[name].double()).abs().max()) for name in relative)
    values = {
        "logprobs": _largest_difference(ours["logprobs_T"], reference["logprobs_T"]),
        "entropies": _largest_difference(ours["entropies_T"], reference["entropies_T"]),
        "loss": difference("loss") / max(abs(metric(reference, "loss")), 1.0),
        "gradient": relative[worst],
        "norm": difference("grad_norm") / max(metric(reference, "grad_norm"), 1e-30),
        "ratio": max(difference("ratio_mean"), difference("ratio_max")),
        "counts": max(map(difference, ("tokens", "clipped_fraction", "gradient_fraction", "segments_mean"))),
    }
    bounds = {
        "logprobs": tolerance.scores,
        "entropies": tolerance.scores,
        "loss": tolerance.loss,
        "gradient": tolerance.gradient,
        "norm": tolerance.norm,
        "ratio": tolerance.ratio,
        "counts": 1e-6,  # counts are integers, summed in float64; segments are counted by their tokens as 1/n each
    }
    reasons = [f"{key} {value:.1e} > {bounds[key]:.0e}" for key, value in values.items() if not value <= bounds[key]]
    reasons += [f"gradient of {name.removeprefix(prefix)} in one of the two only" for name in missing[:3]]
    return Differences(**values, gradient_absolute=absolute, worst=worst.removeprefix(prefix), reasons=tuple(reasons))


def _largest_difference(ours: Tensor, reference: Tensor) -> float:
    return float(((ours.double() - reference.double()).abs() / reference.double().abs().clamp(min=1)).max())


def _relative(ours: Tensor, reference: Tensor) -> float:
    """Return |ours - reference| / |reference|; infinity if only the reference is zero."""
    difference = float(torch.linalg.vector_norm(ours.double() - reference.double()))
    norm = float(torch.linalg.vector_norm(reference.double()))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))
