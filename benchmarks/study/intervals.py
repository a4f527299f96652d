"""Intervals: everything in docs/study.md has one. 95 % each, not adjusted for how many there are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""97.5 % quantiles of Student's t for 1 to 20 degrees of freedom."""
Z_975 = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; ``low`` and ``high`` are NaN with fewer than two values.

    Attributes:
        mean: the estimate.
        low: lower end.
        high: upper end.
        count: values (seeds) behind it.
    """

    mean: float
    low: float
    high: float
    count: int

    def text(self, form: str = ".3f") -> str:
        """Return it as text, each number in this form."""
        if not self.count:
            return "-"
        if math.isnan(self.low):
            return f"{self.mean:{form}} (one seed)"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0; false where there is none."""
        return self.low > 0 or self.high < 0


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean of independent values (one a seed) with Student's interval."""
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = T_975[min(count - 1, len(T_975)) - 1] * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Return the mean of ours - theirs over the seeds that both have: same prompts, same first batch."""
    return mean_of([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def rate(hits: int, count: int) -> Interval:
    """Return a share of runs with Wilson's interval."""
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    share, z2 = hits / count, Z_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_975 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)
