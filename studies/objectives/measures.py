"""Measures of a run, and their means over seeds with 95 % intervals, not adjusted for multiple comparisons.

``reward_mean`` of a rollout batch is the sampled accuracy of that batch's weights on 32 prompts that were never trained
on (the task has hundreds of thousands), 8 answers each. So the curve of accuracy needs no extra evaluations.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from studies.objectives.cells import REAL_MODELS, Condition, RunResult

T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""97.5 % quantiles of Student's t for 1 to 20 degrees of freedom."""
SMOOTH = 3
"""Rollout batches of a moving mean: 768 answers."""
RESPONSES = 256
"""Responses per rollout batch."""


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval.

    Attributes:
        mean: the mean; NaN without values.
        half: half the width; NaN with fewer than two values.
        count: number of values.
    """

    mean: float
    half: float
    count: int

    def text(self, form: str = ".3f") -> str:
        """Return ``mean +-half``; only the mean for one value, and ``-`` without values."""
        if not self.count:
            return "-"
        return f"{self.mean:{form}}" + ("" if math.isnan(self.half) else f" +-{self.half:.3f}")

    @property
    def excludes_zero(self) -> bool:
        """True if 0 is outside the interval; False for fewer than two values."""
        return abs(self.mean) > self.half


def mean_of(values: Sequence[float]) -> Interval:
    """Return the mean of independent values (one per seed) with Student's interval."""
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, T_975[min(count - 1, len(T_975)) - 1] * deviation / math.sqrt(count), count)


def paired(minuend: Mapping[int, float], subtrahend: Mapping[int, float]) -> Interval:
    """Return the mean difference over the seeds that both have; a seed gives both the same prompts and first batch."""
    return mean_of([minuend[seed] - subtrahend[seed] for seed in sorted(minuend.keys() & subtrahend.keys())])


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and the two before it (fewer at the beginning)."""
    windows = [values[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def trained_tokens(line: RunResult) -> list[float]:
    """Return the response tokens that were trained on by the end of each batch."""
    return list(accumulate(RESPONSES * mean for mean in line["curves"]["response_tokens_mean"]))


def measures(line: RunResult) -> dict[str, float]:
    """Return the measures of a run that did not diverge.

    * ``final``: accuracy on the held-out prompts after the last batch.
    * ``training``: accuracy during training, mean over batches.
    * ``tokens``: trained tokens with a gradient, as a share of those whose advantage is not 0, mean over batches.
    * ``gradient``: ``gradient_kept`` of ``metrics.jsonl``, mean over batches; missing where it was not recorded.
    """
    curves = line["curves"]
    rewards = curves["reward_mean"]
    pairs = zip(curves["gradient_fraction"], curves["clipped_fraction"], strict=True)
    signal = [(g, g + c) for g, c in pairs if g + c > 0]
    found = {
        "final": line["accuracy"][str(len(rewards))],
        "training": math.fsum(rewards) / len(rewards),
        "tokens": math.fsum(g for g, _ in signal) / math.fsum(s for _, s in signal),
    }
    if "gradient_kept" in curves:
        found["gradient"] = math.fsum(curves["gradient_kept"]) / len(rewards)
    return found


def collapsed(line: RunResult, share: float) -> bool:
    """Return True if a run diverged or ends below this share of the accuracy at its start, on the same prompts."""
    if "error" in line:
        return True
    accuracy = line["accuracy"]
    return accuracy[max(accuracy, key=int)] < share * accuracy["0"]


Seeds = Mapping[int, RunResult]
"""The results of one variant under one condition, by seed."""
Grouped = Mapping[Condition, Mapping[str, Seeds]]


def grouped(lines: Iterable[RunResult]) -> Grouped:
    """Return the results of the demo's model by condition, variant and seed."""
    found: dict[Condition, dict[str, dict[int, RunResult]]] = {}
    for line in lines:
        if line["suite"] not in REAL_MODELS:
            condition = Condition(line["updates"], line["lr"], line["lag"])
            found.setdefault(condition, {}).setdefault(line["variant"], {})[line["seed"]] = line
    return found


def by_seed(seeds: Seeds, name: str) -> dict[int, float]:
    """Return one measure of every run that did not diverge."""
    found = {seed: measures(line) for seed, line in seeds.items() if "error" not in line}
    return {seed: values[name] for seed, values in found.items() if name in values}
