"""Statistics of an evaluation. Prompts are random draws; the samples of a prompt are correlated (a cluster).

n samples of a prompt, c of them correct, k samples drawn from them without replacement.

Legend: P prompts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, sqrt
from statistics import NormalDist, fmean, variance

import numpy as np

from megatron_rl.errors import DataError

CONFIDENCE = 0.95
BOOTSTRAPS = 10_000
MIN_P = 1e-12
"""Smallest p-value that is reported; smaller values are dominated by rounding."""
MAX_SIGN_FLIP_UNITS = 1 << 22
"""Largest sum of absolute differences, in units, for which the sign-flip test is exact."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its confidence interval of level ``CONFIDENCE``."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: arXiv 2107.03374, equation 1.
    """
    return 1.0 - comb(n - c, k) / comb(n, k)


@lru_cache(maxsize=1 << 16)
def majority_at_k(right: int, wrong: tuple[int, ...], blank: int, k: int) -> float:
    """Return the probability that the most frequent answer of k samples is right; ties are broken at random.

    Args:
        right: number of samples with the right answer.
        wrong: number of samples with each wrong answer.
        blank: number of samples without an answer, which can be drawn but do not vote.
        k: number of samples drawn.
    """
    favorable = 0.0
    for votes in range(1, min(right, k) + 1):
        # (samples drawn, wrong answers with equally many votes) -> number of ways, if no wrong answer has more votes
        ways: Counter[tuple[int, int]] = Counter({(votes, 0): comb(right, votes)})
        for count in wrong:
            extended: Counter[tuple[int, int]] = Counter()
            for (drawn, ties), number in ways.items():
                for added in range(min(count, votes, k - drawn) + 1):
                    extended[drawn + added, ties + (added == votes)] += number * comb(count, added)
            ways = extended
        favorable += sum(number * comb(blank, k - drawn) / (1 + ties) for (drawn, ties), number in ways.items())
    return favorable / comb(right + sum(wrong) + blank, k)


def interval(values_P: Sequence[float]) -> Estimate:
    """Return the mean of values in [0, 1] with a Wilson interval, clustered by prompt.

    The effective sample size is the number of independent binary outcomes whose mean has the observed variance:
    P p (1 - p) / s^2. The variance s^2 is estimated as if one more prompt had contributed p (1 - p), because few
    prompts may show too little variance. The quantile is Student's. With one sample per prompt this is nearly
    Wilson's interval for P outcomes.

    Args:
        values_P: mean of the samples of each prompt.
    """
    count, mean = len(values_P), min(1.0, max(0.0, fmean(values_P)))
    if count == 1:
        return Estimate(mean, 0.0, 1.0)
    binary_variance = mean * (1 - mean)
    ratio = (variance(values_P) / binary_variance * count + 1) / (count + 1) if binary_variance else 1.0
    effective, t = count / ratio, student_quantile(count - 1)
    center = (mean + t * t / (2 * effective)) / (1 + t * t / effective)
    half = t / (1 + t * t / effective) * sqrt(binary_variance / effective + t * t / (4 * effective**2))
    return Estimate(mean, max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half)))


def student_quantile(freedom: int) -> float:
    """Return the two-sided quantile of Student's distribution at level ``CONFIDENCE``.

    Uses the Cornish-Fisher expansion, which is accurate to 1 % for 3 or more degrees of freedom.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def paired_interval(differences_P: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of per-prompt differences with a bootstrap interval that resamples prompts.

    Args:
        differences_P: difference of the means of a prompt's samples.
        seed: seed of the resampling.
    """
    values, counts = np.unique(np.asarray(differences_P, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=BOOTSTRAPS) @ values / total
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values @ counts) / total, float(low), float(high))


def sign_flip_p(differences_P: Sequence[int]) -> float:
    """Return the two-sided p-value of the exact sign-flip permutation test that the differences have mean 0.

    Under the null hypothesis each difference has either sign with probability 1/2. With differences of -1, 0 and 1, as
    with one sample per prompt, this is McNemar's exact test. The distribution of the sum over all sign flips is the
    Fourier transform of a product of cosines. P-values below ``MIN_P`` are returned as ``MIN_P``.

    Args:
        differences_P: differences in integer units.

    Raises:
        DataError: the sum of absolute differences exceeds ``MAX_SIGN_FLIP_UNITS``.
    """
    observed = abs(sum(differences_P))
    sizes = Counter(abs(difference) for difference in differences_P if difference)
    total = sum(size * count for size, count in sizes.items())
    if total > MAX_SIGN_FLIP_UNITS:
        raise DataError(
            f"the absolute differences sum to {total} units of 1 / (samples per prompt); the exact sign-flip test takes"
            f" at most {MAX_SIGN_FLIP_UNITS}; evaluate both with the same evaluate.samples"
        )
    if not total:
        return 1.0
    points = 2 * total + 1
    angles = 2 * np.pi * np.arange(points) / points
    waves = np.ones(points)
    for size, count in sizes.items():
        waves *= np.cos(size * angles) ** count
    probabilities = np.fft.fft(waves).real / points  # index: sum modulo the number of points
    tail = probabilities[observed : total + 1].sum()
    return float(min(1.0, max(MIN_P, 2 * tail if observed else 1.0)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm's method (family-wise error rate)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
