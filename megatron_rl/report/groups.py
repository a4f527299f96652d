"""Groups of runs that differ only in their seed, and the settings in which groups differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.report.plot import Series
from megatron_rl.report.runs import RunFolder

SEED = "train.seed"
IGNORED_SETTINGS = ("log.", "train.resume")
"""Prefixes of settings in which runs of a group may differ."""

MAX_POINTS = 600
"""Points per curve; more would make the page large without being visible."""

ABSENT = "-"
MAX_LABEL_LENGTH = 48


@dataclass(frozen=True)
class RunGroup:
    """Runs with equal settings except for the seed.

    Attributes:
        label: name of the objective, with other settings if they are needed to distinguish groups.
        runs: the runs, usually one per seed.
    """

    label: str
    runs: Sequence[RunFolder]

    def curve(self, key: str) -> Series | None:
        """Return mean, minimum and maximum over runs of a metric by step; None if no run has it."""
        columns = [values for run in self.runs if (values := run.values(key))]
        steps = sorted({step for values in columns for step in values})
        by_step = [[values[step] for values in columns if step in values] for step in steps]
        if not by_step:
            return None
        low, high = ([min(v) for v in by_step], [max(v) for v in by_step]) if len(columns) > 1 else (None, None)
        return downsample(Series(self.label, steps, [sum(v) / len(v) for v in by_step], low, high))


def downsample(series: Series) -> Series:
    """Return a curve of at most ``MAX_POINTS`` points: means of neighboring points, and bands that contain theirs."""
    width = -(-len(series.x) // MAX_POINTS)
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
    """Return the groups of runs with equal settings except for the seed, in the order of their first runs."""
    members: dict[str, list[RunFolder]] = {}
    for run in runs:
        # A run without settings is a group of its own.
        key = json.dumps(_settings_to_compare(run), sort_keys=True) if run.settings else f"?{run.name}"
        members.setdefault(key, []).append(run)
    groups = list(members.values())
    return [RunGroup(label, group) for label, group in zip(_labels(groups), groups, strict=True)]


def _settings_to_compare(run: RunFolder) -> dict[str, object]:
    return {k: v for k, v in run.settings.items() if k != SEED and not k.startswith(IGNORED_SETTINGS)}


def differences(groups: Sequence[Sequence[RunFolder]]) -> dict[str, list[object]]:
    """Return the settings that are not equal in all groups, with the value of each group."""
    settings = [_settings_to_compare(group[0]) for group in groups]
    keys = dict.fromkeys(key for group in settings for key in group)
    rows = {key: [group.get(key, ABSENT) for group in settings] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _labels(groups: Sequence[Sequence[RunFolder]]) -> list[str]:
    """Return labels: the objective, with differing settings if it is not unique, or the name of the first run."""
    objectives = [group[0].objective for group in groups]
    if len(set(objectives)) == len(groups):
        return objectives
    different = {key: values for key, values in differences(groups).items() if key != "objective.name"}
    labels = []
    for number, group in enumerate(groups):
        same = [other for other, objective in enumerate(objectives) if objective == objectives[number]]
        details = _distinguishing_settings(different, same, number) if len(same) > 1 else []
        label = ", ".join([objectives[number], *details])
        labels.append(label if len(label) <= MAX_LABEL_LENGTH and group[0].settings else group[0].name)
    return labels if len(set(labels)) == len(labels) else [group[0].name for group in groups]


def _distinguishing_settings(different: Mapping[str, Sequence[object]], same: Sequence[int], number: int) -> list[str]:
    """Return the settings, as text, that distinguish a group from those with the same objective."""
    distinguishing = {
        key: values for key, values in different.items() if any(values[o] != values[number] for o in same)
    }
    return [f"{key.rpartition('.')[2]} {setting_text(values[number])}" for key, values in distinguishing.items()]


def setting_text(value: object) -> str:
    """Return the value of a setting as text."""
    return value if isinstance(value, str) else json.dumps(value)
