"""Runs that differ by nothing but their seed belong together; what the others differ by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.report.plot import Series
from megatron_rl.report.runs import RunFolder

SEED = "train.seed"
NO_DIFFERENCE = ("log.", "train.resume")
"""Settings that say where a run is written and shown, or that it was continued: runs may differ by them."""

MOST_POINTS = 600
"""Of a curve: more would make the page large and be no easier to see."""

ABSENT = "-"
LONGEST_LABEL = 48


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration.

    Attributes:
        label: its objective, or what else tells it from the other groups.
        runs: one a seed.
    """

    label: str
    runs: Sequence[RunFolder]

    def curve(self, key: str) -> Series | None:
        """Return a metric by step: the mean over the runs that have it, lowest and highest; None if no run has it."""
        columns = [values for run in self.runs if (values := run.values(key))]
        steps = sorted({step for values in columns for step in values})
        at = [[values[step] for values in columns if step in values] for step in steps]
        if not at:
            return None
        low, high = ([min(v) for v in at], [max(v) for v in at]) if len(columns) > 1 else (None, None)
        return thinned(Series(self.label, steps, [sum(v) / len(v) for v in at], low, high))


def thinned(series: Series) -> Series:
    """Return a curve of at most ``MOST_POINTS``: means over as many neighbours as it takes, bands that hold theirs."""
    width = -(-len(series.x) // MOST_POINTS)
    if width == 1:
        return series
    low, high = series.low, series.high
    parts = [slice(start, start + width) for start in range(0, len(series.x), width)]
    return Series(
        series.label,
        [_mean(series.x[part]) for part in parts],
        [_mean(series.y[part]) for part in parts],
        None if low is None else [min(low[part]) for part in parts],
        None if high is None else [max(high[part]) for part in parts],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def group_runs(runs: Sequence[RunFolder]) -> list[RunGroup]:
    """Return the runs in groups of equal settings but for the seed, in the order in which they are named."""
    members: dict[str, list[RunFolder]] = {}
    for run in runs:
        # Without settings nothing is known to be equal.
        key = json.dumps(_compared(run), sort_keys=True) if run.settings else f"?{run.name}"
        members.setdefault(key, []).append(run)
    groups = list(members.values())
    return [RunGroup(label, group) for label, group in zip(_labels(groups), groups, strict=True)]


def _compared(run: RunFolder) -> dict[str, object]:
    return {k: v for k, v in run.settings.items() if k != SEED and not k.startswith(NO_DIFFERENCE)}


def differences(groups: Sequence[Sequence[RunFolder]]) -> dict[str, list[object]]:
    """Return each setting that is not the same in all groups, with its value in each."""
    settings = [_compared(group[0]) for group in groups]
    keys = dict.fromkeys(key for group in settings for key in group)
    rows = {key: [group.get(key, ABSENT) for group in settings] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _labels(groups: Sequence[Sequence[RunFolder]]) -> list[str]:
    """Return the objective's name, with the other differences where it does not do; at worst the first run's name."""
    objectives = [group[0].objective for group in groups]
    if len(set(objectives)) == len(groups):
        return objectives
    different = {key: values for key, values in differences(groups).items() if key != "objective.name"}
    labels = []
    for number, group in enumerate(groups):
        same = [other for other, objective in enumerate(objectives) if objective == objectives[number]]
        own = _telling(different, same, number) if len(same) > 1 else []
        label = ", ".join([objectives[number], *own])
        labels.append(label if len(label) <= LONGEST_LABEL and group[0].settings else group[0].name)
    return labels if len(set(labels)) == len(labels) else [group[0].name for group in groups]


def _telling(different: Mapping[str, Sequence[object]], same: Sequence[int], number: int) -> list[str]:
    """Return the settings, as words, that tell a group from those with the same objective."""
    telling = {key: values for key, values in different.items() if any(values[o] != values[number] for o in same)}
    return [f"{key.rpartition('.')[2]} {words(values[number])}" for key, values in telling.items()]


def words(value: object) -> str:
    """Return a setting's value as a person would write it."""
    return value if isinstance(value, str) else json.dumps(value)
