"""The plots of a report, as SVG, from groups of runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.report.groups import RunGroup
from megatron_rl.report.plot import Series, bars, curves, stacked
from megatron_rl.report.runs import Line
from megatron_rl.report.samples import ClipBins, ClipCounts

OVERLAPPING = ("total", "fleet")
"""Times that are not separate phases of a step."""

MIN_SEGMENTS = 100
"""Bins with fewer segments of a group are left out, because their clipped share is too noisy."""


@dataclass(frozen=True)
class Panel:
    """The plot of a metric: key in ``metrics.jsonl``, title, unit of the vertical axis."""

    key: str
    title: str
    unit: str
    log: bool = False


CURVES = (
    Panel("reward_mean", "Reward, mean of the batch", "reward"),
    Panel("accuracy", "Accuracy on held-out prompts", "share correct"),
    Panel("entropy_mean", "Entropy of the policy", "nats per token"),
    Panel("clipped_fraction", "Clipped tokens", "share of tokens"),
    Panel("gradient_kept", "Gradient kept", "share of the plain policy gradient"),
    Panel("ratio_max", "Largest importance ratio", "ratio", log=True),
    Panel("policy_kl_mean", "KL(old || current)", "nats per token", log=True),
    Panel("grad_norm", "Gradient norm before clipping", "norm", log=True),
    Panel("loss", "Loss", "loss"),
    Panel("response_tokens_mean", "Length of responses", "tokens"),
    Panel("segments_mean", "Segments per response", "segments"),
    Panel("zero_variance_fraction", "Prompts with equal rewards", "share of prompts"),
    Panel("truncated_fraction", "Truncated responses", "share of responses"),
    Panel("unverified_fraction", "Responses without a reward", "share of responses"),
    Panel("reference_kl_mean", "KL(current || reference)", "nats per token", log=True),
    Panel("correction_mean", "Correction weight", "weight"),
    Panel("entropy_coefficient", "Coefficient of the entropy bonus", "coefficient"),
    Panel("lag_mean", "Lag of the tokens", "weight versions"),
    Panel("lr", "Learning rate", "rate"),
)
MISMATCH = (
    Panel("mismatch_kl", "KL(rollout || trainer)", "nats per token", log=True),
    Panel("mismatch_p50", "Gap of log-probs, median", "nats", log=True),
    Panel("mismatch_p99", "Gap of log-probs, 99th percentile", "nats", log=True),
    Panel("mismatch_max", "Gap of log-probs, largest", "nats", log=True),
    Panel("routing_differs_tokens", "Tokens with different experts", "share of tokens"),
)
MEASURE, GATE = "objective/", "gate/"
"""Prefixes of the metrics that an objective measures itself, and of what gates drop."""
TIMES = (Panel("seconds/total", "Time per step", "seconds", log=True),)


def objective_panels(groups: Sequence[RunGroup]) -> list[Panel]:
    """Return a panel of each metric ``objective/NAME`` and ``gate/NAME`` of these runs."""
    keys = {key for group in groups for run in group.runs for line in run.lines for key in line}
    measures = [(key, f"Objective: {_words(key)}", "value") for key in sorted(keys) if key.startswith(MEASURE)]
    drops = [
        (key, f"Dropped by the gate: {_words(key)}", "share of tokens") for key in sorted(keys) if key.startswith(GATE)
    ]
    return [Panel(*panel) for panel in measures + drops]


def _words(key: str) -> str:
    return key.partition("/")[2].replace("_", " ")


def metric_plots(groups: Sequence[RunGroup], panels: Sequence[Panel]) -> Iterator[tuple[str, str]]:
    """Yield (name, SVG) of each panel whose metric a run has and is not always 0."""
    for panel in panels:
        series = [curve for group in groups if (curve := group.curve(panel.key))]
        values = [value for curve in series for value in curve.y]
        if any(values) and (not panel.log or any(value > 0 for value in values)):
            # Groups without the metric get an empty curve, so that a group has the same color in all plots.
            present = {curve.label for curve in series}
            series += [Series(group.label, [], []) for group in groups if group.label not in present]
            order = [group.label for group in groups]
            series.sort(key=lambda curve: order.index(curve.label))
            yield panel.key.replace("/", "_"), curves(series, title=panel.title, y=panel.unit, log=panel.log)


def phase_plot(groups: Sequence[RunGroup]) -> str | None:
    """Return the plot of the mean seconds per step of each phase, without the first step; None without data."""
    times: list[dict[str, float]] = []
    for group in groups:
        lines = [line["seconds"] for run in group.runs for line in _warm(run.trained) if "seconds" in line]
        names = dict.fromkeys(name for line in lines for name in line)
        times.append({name: sum(line.get(name, 0.0) for line in lines) / len(lines) for name in names})
    phases = [name for name in dict.fromkeys(n for seconds in times for n in seconds) if name not in OVERLAPPING]
    if not phases:
        return None
    parts = [(phase, [seconds.get(phase, 0.0) for seconds in times]) for phase in phases]
    rest = [max(seconds.get("total", 0.0) - sum(seconds.get(phase, 0.0) for phase in phases), 0.0) for seconds in times]
    labels = [group.label for group in groups]
    return stacked(labels, [*parts, ("other", rest)], title="Phases of a step, mean", x="seconds", width=820)


def _warm(steps: Sequence[Line]) -> Sequence[Line]:
    """Return the lines without the first, in which servers start, unless it is the only one."""
    return steps[1:] or steps


def clip_plots(groups: Sequence[RunGroup], clips: Sequence[Sequence[ClipCounts]]) -> Iterator[tuple[str, str]]:
    """Yield (name, SVG) of the share of clipped segments by length and by entropy.

    Args:
        groups: groups of runs.
        clips: counts of each run of each group.
    """
    for kind, title, unit in (
        ("by_length", "Clipped segments, by length", "tokens of the segment"),
        ("by_entropy", "Clipped segments, by mean entropy", "nats per token, policy at the start of the step"),
    ):
        bins_of_groups = [[bins for counts in group if (bins := counts.bins(kind))] for group in clips]
        names = next((bins[0].names for bins in bins_of_groups if bins), None)
        if names is None:
            continue
        used = [index for index in range(len(names)) if any(_is_used(bins, index) for bins in bins_of_groups)]
        series = [_shares(group.label, bins, used) for group, bins in zip(groups, bins_of_groups, strict=True)]
        categories = [names[index] for index in used]
        yield f"clipped_{kind}", bars(categories, series, title=title, y="share of segments", x=unit)


def _is_used(bins: Sequence[ClipBins], index: int) -> bool:
    return sum(run.segments[index] for run in bins) >= MIN_SEGMENTS


def _shares(label: str, bins: Sequence[ClipBins], used: Sequence[int]) -> Series:
    """Return the clipped shares of all seeds together in the used bins, with those of the lowest and highest seed."""
    positions = [position for position, index in enumerate(used) if _is_used(bins, index)]
    indices = [used[position] for position in positions]
    pooled = [sum(run.clipped[index] for run in bins) / sum(run.segments[index] for run in bins) for index in indices]
    if len(bins) == 1:
        return Series(label, positions, pooled)
    shares = [[run.share(index) for run in bins if run.segments[index]] for index in indices]
    return Series(label, positions, pooled, [min(values) for values in shares], [max(values) for values in shares])
