"""The statistics of an evaluation, on plain numbers. Prompts are drawn at random; the samples of one belong together.

Legend: n samples of a prompt, c correct ones, k samples that are drawn from them without putting back, P prompts.
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
LEAST_P = 1e-12
"""Below this, rounding decides."""
MOST_FLIPPED = 1 << 22
"""Largest sum of differences, in the smallest unit, for which all sign flips are counted."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval of ``CONFIDENCE``."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of k samples is correct: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1)."""
    return 1.0 - comb(n - c, k) / comb(n, k)


@lru_cache(maxsize=1 << 16)
def majority_at_k(right: int, wrong: tuple[int, ...], blank: int, k: int) -> float:
    """Return the chance that the most frequent answer of k samples is right; where several lead, each wins as often.

    Args:
        right: samples with the right answer.
        wrong: samples of each wrong answer.
        blank: samples without an answer: they take part and have no vote.
        k: samples drawn.
    """
    won = 0.0
    for votes in range(1, min(right, k) + 1):
        # (samples taken, wrong answers with as many votes) -> ways, for wrong answers with at most as many votes
        ways: Counter[tuple[int, int]] = Counter({(votes, 0): comb(right, votes)})
        for count in wrong:
            following: Counter[tuple[int, int]] = Counter()
            for (taken, ties), number in ways.items():
                for more in range(min(count, votes, k - taken) + 1):
                    following[taken + more, ties + (more == votes)] += number * comb(count, more)
            ways = following
        won += sum(number * comb(blank, k - taken) / (1 + ties) for (taken, ties), number in ways.items())
    return won / comb(right + sum(wrong) + blank, k)


def interval(values_P: Sequence[float]) -> Estimate:
    """Return the mean of the prompts' values in [0, 1] with a Wilson interval, clustered by prompt.

    The prompts count as so many independent yes-or-no answers as would give the mean its variance: P p (1 - p) / s^2,
    where s^2 is taken as if one prompt more had had the whole p (1 - p), since few prompts may show too little of it.
    The quantile is Student's. With one sample a prompt this is Wilson's interval for (almost) P answers.
    """
    count, mean = len(values_P), min(1.0, max(0.0, fmean(values_P)))
    if count == 1:
        return Estimate(mean, 0.0, 1.0)
    whole = mean * (1 - mean)
    share = (variance(values_P) / whole * count + 1) / (count + 1) if whole else 1.0
    effective, t = count / share, student_quantile(count - 1)
    centre = (mean + t * t / (2 * effective)) / (1 + t * t / effective)
    half = t / (1 + t * t / effective) * sqrt(whole / effective + t * t / (4 * effective**2))
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def student_quantile(freedom: int) -> float:
    """Return the two-sided quantile of Student's distribution, to 1 % from 3 degrees of freedom on (Cornish-Fisher)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def paired_interval(differences_P: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of the prompts' differences with a bootstrap interval: whole prompts are drawn, P at a time."""
    values, counts = np.unique(np.asarray(differences_P, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=BOOTSTRAPS) @ values / total
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values @ counts) / total, float(low), float(high))


def sign_flip_p(differences_P: Sequence[int]) -> float:
    """Return the two-sided p-value of the exact sign-flip permutation test that the differences have mean 0.

    Each prompt's difference, in whole units, might as well have had the other sign. With differences of -1, 0 and 1,
    that is with one sample a prompt, this is McNemar's exact test. All flips are counted at once: the distribution of
    their sum is the Fourier transform of a product of cosines, exact to ``LEAST_P``: what is smaller is told as that.
    """
    observed = abs(sum(differences_P))
    sizes = Counter(abs(difference) for difference in differences_P if difference)
    total = sum(size * count for size, count in sizes.items())
    if total > MOST_FLIPPED:
        raise DataError(
            f"the differences are {total} units of 1 / (samples of a prompt) in all, more than {MOST_FLIPPED} can be"
            " flipped; evaluate both with the same evaluate.samples"
        )
    if not total:
        return 1.0
    points = 2 * total + 1
    angles = 2 * np.pi * np.arange(points) / points
    waves = np.ones(points)
    for size, count in sizes.items():
        waves *= np.cos(size * angles) ** count
    chances = np.fft.fft(waves).real / points  # of sum s at index s modulo the number of points
    tail = chances[observed : total + 1].sum()
    return float(min(1.0, max(LEAST_P, 2 * tail if observed else 1.0)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of tests made together, after Holm: one below 0.05 is not chance alone at that level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
