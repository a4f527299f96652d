"""Gates once more, slowly: one unit at a time, Python floats."""

import math
from collections.abc import Sequence

from tests.oracle.objectives import mean


def gap(measure: str, trainer: float, rollout: float) -> float:
    """The measure of one token, from log-probs; for the ratio, its logarithm."""
    pi, mu = math.exp(trainer), math.exp(rollout)
    return {
        "ratio": trainer - rollout,
        "kl": mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi)),
        "tv": abs(mu - pi),
        "k3": pi / mu - 1 - (trainer - rollout),
    }[measure]


def is_dropped(
    trainer: Sequence[float], rollout: Sequence[float], measure: str, reduction: str, low: float, high: float
) -> bool:
    """Whether the gate drops the unit with these tokens."""
    gaps = [gap(measure, pi, mu) for pi, mu in zip(trainer, rollout, strict=True)]
    whole = math.fsum(gaps) if reduction == "product" else mean(gaps)
    values = gaps if reduction == "max" else [whole]
    values = [math.exp(value) if measure == "ratio" else value for value in values]
    return any(not low <= value <= high for value in values)
