"""Which plots a report has, from groups of runs to SVG."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.report.groups import RunGroup
from megatron_rl.report.plot import Series, bars, curves, stacked
from megatron_rl.report.runs import Line
from megatron_rl.report.samples import ClipBins, ClipCounts

OVERLAPPING = ("total", "fleet")
"""Times that are not of a phase of their own."""

FEWEST_SEGMENTS = 100
"""Of a group in a bin whose clipped share is shown: of fewer it says little."""


@dataclass(frozen=True)
class Panel:
    """A metric's plot: its key in ``metrics.jsonl``, its title, the unit of its axis."""

    key: str
    title: str
    unit: str
    log: bool = False


CURVES = (
    Panel("reward_mean", "Reward, mean of the batch", "reward"),
    Panel("accuracy", "Accuracy on held-out prompts", "share right"),
    Panel("entropy_mean", "Entropy of the policy", "nats a token"),
    Panel("clipped_fraction", "Clipped tokens", "share of tokens"),
    Panel("gradient_kept", "Gradient kept", "share of the plain policy gradient"),
    Panel("ratio_max", "Largest importance ratio", "ratio", log=True),
    Panel("policy_kl_mean", "KL(old || current)", "nats a token", log=True),
    Panel("grad_norm", "Gradient norm before clipping", "norm", log=True),
    Panel("loss", "Loss", "loss"),
    Panel("response_tokens_mean", "Length of responses", "tokens"),
    Panel("segments_mean", "Segments of a response", "segments"),
    Panel("zero_variance_fraction", "Prompts without a signal", "share of prompts"),
    Panel("truncated_fraction", "Truncated responses", "share of responses"),
    Panel("unverified_fraction", "Responses without a reward", "share of responses"),
    Panel("reference_kl_mean", "KL(current || reference)", "nats a token", log=True),
    Panel("correction_mean", "Weight against the mismatch", "weight"),
    Panel("lag_mean", "Age of the tokens", "weight versions"),
    Panel("lr", "Learning rate", "rate"),
)
MISMATCH = (
    Panel("mismatch_kl", "KL(rollout || trainer)", "nats a token", log=True),
    Panel("mismatch_p50", "Gap of log-probs, median", "nats", log=True),
    Panel("mismatch_p99", "Gap of log-probs, 99th percentile", "nats", log=True),
    Panel("mismatch_max", "Gap of log-probs, largest", "nats", log=True),
    Panel("routing_differs_tokens", "Tokens sent to other experts", "share of tokens"),
)
TIMES = (Panel("seconds/total", "Time of a step", "seconds", log=True),)


def metric_plots(groups: Sequence[RunGroup], panels: Sequence[Panel]) -> Iterator[tuple[str, str]]:
    """Yield (file name, SVG) of each panel whose metric any run has, and that is not 0 all the time."""
    for panel in panels:
        series = [curve for group in groups if (curve := group.curve(panel.key))]
        values = [value for curve in series for value in curve.y]
        if any(values) and (not panel.log or any(value > 0 for value in values)):
            # A group without the metric keeps the others' colours only if it stays in the legend.
            present = {curve.label for curve in series}
            series += [Series(group.label, [], []) for group in groups if group.label not in present]
            order = [group.label for group in groups]
            series.sort(key=lambda curve: order.index(curve.label))
            yield panel.key.replace("/", "_"), curves(series, title=panel.title, y=panel.unit, log=panel.log)


def phase_plot(groups: Sequence[RunGroup]) -> str | None:
    """Return the mean seconds of each phase a step, the first step left out where there are others; None: not known."""
    times: list[dict[str, float]] = []
    for group in groups:
        lines = [line["seconds"] for run in group.runs for line in _warm(run.trained) if "seconds" in line]
        names = dict.fromkeys(name for line in lines for name in line)
        times.append({name: sum(line.get(name, 0.0) for line in lines) / len(lines) for name in names})
    phases = [name for name in dict.fromkeys(n for own in times for n in own) if name not in OVERLAPPING]
    if not phases:
        return None
    parts = [(phase, [own.get(phase, 0.0) for own in times]) for phase in phases]
    rest = [max(own.get("total", 0.0) - sum(own.get(phase, 0.0) for phase in phases), 0.0) for own in times]
    labels = [group.label for group in groups]
    return stacked(labels, [*parts, ("other", rest)], title="Phases of a step, mean", x="seconds", width=820)


def _warm(steps: Sequence[Line]) -> Sequence[Line]:
    """Return the lines without the first, in which servers start, if there are others."""
    return steps[1:] or steps


def clip_plots(groups: Sequence[RunGroup], clips: Sequence[Sequence[ClipCounts]]) -> Iterator[tuple[str, str]]:
    """Yield (file name, SVG): the share of clipped segments by their length and by their entropy.

    ``clips`` has those of each run of each group.
    """
    for kind, title, unit in (
        ("by_length", "Clipped segments, by length", "tokens of the segment"),
        ("by_entropy", "Clipped segments, by mean entropy", "nats a token, policy at the start of the step"),
    ):
        found = [[own for clip in of_group if (own := clip.bins(kind))] for of_group in clips]
        names = next((bins[0].names for bins in found if bins), None)
        if names is None:
            continue
        used = [place for place in range(len(names)) if any(_known(bins, place) for bins in found)]
        series = [_shares(group.label, bins, used) for group, bins in zip(groups, found, strict=True)]
        shown = [names[place] for place in used]
        yield f"clipped_{kind}", bars(shown, series, title=title, y="share of segments", x=unit)


def _known(bins: Sequence[ClipBins], place: int) -> bool:
    return sum(own.segments[place] for own in bins) >= FEWEST_SEGMENTS


def _shares(label: str, bins: Sequence[ClipBins], used: Sequence[int]) -> Series:
    """Return the clipped share of all seeds together, and that of the lowest and the highest seed, in these bins."""
    there = [number for number, place in enumerate(used) if _known(bins, place)]
    places = [used[number] for number in there]
    pooled = [sum(own.clipped[place] for own in bins) / sum(own.segments[place] for own in bins) for place in places]
    if len(bins) == 1:
        return Series(label, there, pooled)
    shares = [[own.share(place) for own in bins if own.segments[place]] for place in places]
    return Series(label, there, pooled, [min(own) for own in shares], [max(own) for own in shares])
