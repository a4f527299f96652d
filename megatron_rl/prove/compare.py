"""How far a layout's step lies from the reference, and whether that is rounding.

All differences are of the layout from the one-rank float64 run of the same step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that count as rounding.

    Attributes:
        scores: log-probs and entropies, nats, relative to max(1, |value|): rounding grows with the logits.
        loss: relative to the sum of absolute weighted costs, whose rounding the loss inherits; here to max(|loss|, 1).
        gradient: of any parameter, the norm of the difference relative to the parameter's own gradient norm.
        norm: gradient norm as megatron computes it, relative.
        ratio: mean and largest segment ratio, absolute.
    """

    scores: float
    loss: float
    gradient: float
    norm: float
    ratio: float


TOLERANCES: Mapping[str, Tolerance] = {
    # megatron-core's router takes its softmax in float32 whatever the model's type: 6e-8 a layer, and what follows.
    "float64": Tolerance(scores=1e-6, loss=1e-6, gradient=1e-5, norm=1e-6, ratio=1e-6),
    # float32 has spacing 1.2e-7; logits of size 10 after a few layers carry some 1e-6, gradients ten times that. A
    # trained model gives random tokens log-probs near -30 out of logits near 40 (spacing 4e-6, added up over layers).
    "float32": Tolerance(scores=5e-5, loss=1e-5, gradient=5e-4, norm=1e-4, ratio=1e-4),
    # bfloat16 keeps 8 bits: spacing 4e-3 at 1, and a route may flip. Only gross errors can be told from rounding.
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
    def holds(self) -> bool:
        """Whether all of it is rounding."""
        return not self.reasons

    def record(self) -> dict[str, object]:
        """Return it for ``prove.json``."""
        return asdict(self) | {"holds": self.holds}


def differences(
    ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], objective: str, tolerance: Tolerance
) -> Differences:
    """Compare the results of one objective; both mappings are what ``prove.rank`` writes."""

    def metric(results: Mapping[str, Tensor], name: str) -> float:
        return float(results[f"{objective}/metric.{name}"])

    def apart(name: str) -> float:
        return abs(metric(ours, name) - metric(reference, name))

    prefix = f"{objective}/gradient."
    names = [name for name in reference if name.startswith(prefix)]
    missing = sorted(set(names) ^ {name for name in ours if name.startswith(prefix)})
    relative = {name: _relative(ours[name], reference[name]) for name in names if name in ours}
    worst = max(relative, key=lambda name: relative[name])
    absolute = max(float((ours[name].double() - reference[name].double()).abs().max()) for name in relative)
    found = {
        "logprobs": _apart(ours["logprobs_T"], reference["logprobs_T"]),
        "entropies": _apart(ours["entropies_T"], reference["entropies_T"]),
        "loss": apart("loss") / max(abs(metric(reference, "loss")), 1.0),
        "gradient": relative[worst],
        "norm": apart("grad_norm") / max(metric(reference, "grad_norm"), 1e-30),
        "ratio": max(apart("ratio_mean"), apart("ratio_max")),
        "counts": max(map(apart, ("tokens", "clipped_fraction", "gradient_fraction", "segments_mean"))),
    }
    bounds = {
        "logprobs": tolerance.scores,
        "entropies": tolerance.scores,
        "loss": tolerance.loss,
        "gradient": tolerance.gradient,
        "norm": tolerance.norm,
        "ratio": tolerance.ratio,
        "counts": 1e-6,  # counts are integers, added up in float64; segments are counted by shares 1/n
    }
    reasons = [f"{key} {value:.1e} > {bounds[key]:.0e}" for key, value in found.items() if not value <= bounds[key]]
    reasons += [f"gradient of {name.removeprefix(prefix)} on one side only" for name in missing[:3]]
    return Differences(**found, gradient_absolute=absolute, worst=worst.removeprefix(prefix), reasons=tuple(reasons))


def _apart(ours: Tensor, reference: Tensor) -> float:
    return float(((ours.double() - reference.double()).abs() / reference.double().abs().clamp(min=1)).max())


def _relative(ours: Tensor, reference: Tensor) -> float:
    """Return |ours - reference| / |reference|; where the reference is zero anything else is infinitely wrong."""
    apart = float(torch.linalg.vector_norm(ours.double() - reference.double()))
    size = float(torch.linalg.vector_norm(reference.double()))
    return apart / size if size else (0.0 if apart == 0 else float("inf"))
