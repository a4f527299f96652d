"""``tokens.jsonl`` as a report reads it: counts of clipped segments of all steps, and responses of some steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_rl.observability.file_names import TOKENS
from megatron_rl.report.plot import short
from megatron_rl.report.runs import Line, RunFolder, json_lines

MAX_STEPS = 60
"""Steps per run whose responses are shown."""

PAGE_BYTES = 24_000_000
"""Approximate limit of all responses in a page. Fewer steps are shown to stay below it, but at least two per run."""


TOKEN_KEYS = ("text", "old", "new", "entropy", "rollout", "segment")
SEGMENT_KEYS = {"tokens", "entropy", "ratio", "clipped"}
SAMPLE_KEYS = {*TOKEN_KEYS, "id", "prompt", "reward", "advantage", "tokens", "all_segments", "segments"}


@dataclass(frozen=True)
class ClipBins:
    """Histograms of all segments and of clipped segments, over all steps of a run.

    Attributes:
        names: names of the bins.
        segments: number of segments per bin.
        clipped: number of clipped segments per bin; a partly clipped segment counts by its clipped share.
    """

    names: Sequence[str]
    segments: Sequence[float]
    clipped: Sequence[float]

    def share(self, index: int) -> float:
        """Return the clipped share of a nonempty bin."""
        return self.clipped[index] / self.segments[index]


@dataclass
class ClipCounts:
    """Histograms summed over the lines of ``tokens.jsonl``."""

    _edges: dict[str, Sequence[float]] = field(default_factory=dict)
    _sums: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Add the counts of a step."""
        for kind in ("by_length", "by_entropy"):
            counts = line.get(kind)
            if not isinstance(counts, Mapping) or not {"edges", "segments", "clipped"} <= counts.keys():
                continue
            # A run that was resumed with other bins keeps its first ones.
            if counts["edges"] != self._edges.setdefault(kind, counts["edges"]):
                continue
            sums = self._sums.setdefault(kind, {})
            for name in ("segments", "clipped"):
                before = sums.get(name, [0.0] * len(counts[name]))
                sums[name] = [a + b for a, b in zip(before, counts[name], strict=True)]

    def bins(self, kind: str) -> ClipBins | None:
        """Return the histograms ``by_length`` or ``by_entropy``; None if no line has them."""
        if kind not in self._sums:
            return None
        edges, sums = self._edges[kind], self._sums[kind]
        names = _length_names(edges) if kind == "by_length" else _entropy_names(edges)
        return ClipBins(names, sums["segments"], sums["clipped"])


def _length_names(edges: Sequence[float]) -> list[str]:
    """Return names of integer bins that include their upper edge: 1, 2, 3-4, 5-8, ..."""
    whole = [int(edge) for edge in edges]
    inner = [f"{low + 1}-{high}" if high > low + 1 else str(high) for low, high in pairwise(whole)]
    return [f"{whole[0]}", *inner, f">{whole[-1]}"]


def _entropy_names(edges: Sequence[float]) -> list[str]:
    inner = [f"{short(low)}-{short(high)}" for low, high in pairwise(edges)]
    return [f"<{short(edges[0])}", *inner, f">{short(edges[-1])}"]


@dataclass(frozen=True)
class RecordedSamples:
    """The part of ``tokens.jsonl`` that is shown.

    Attributes:
        clips: histograms over all steps.
        lines: lines of the steps whose responses are shown.
        recorded: number of steps in the file.
    """

    clips: ClipCounts
    lines: Sequence[Line]
    recorded: int

    @property
    def clipped_word(self) -> str:
        """How the objective calls a clipped token: a capped one still trains."""
        return str(self.lines[0].get("clipped_word", "clipped")) if self.lines else "clipped"


def read_samples(run: RunFolder, max_steps: int = MAX_STEPS, max_bytes: int = PAGE_BYTES) -> RecordedSamples:
    """Return the clip counts of all steps and the responses of evenly spaced steps, including the first and the last.

    Only the responses that are shown are kept in memory. Invalid lines are left out.
    """
    clips, path = ClipCounts(), run.path / TOKENS
    if not path.is_file():
        return RecordedSamples(clips, (), 0)
    recorded = 0
    for line in json_lines(path, []):
        clips.add(line)
        recorded += 1
    shown = max(min(max_steps, max_bytes * recorded // max(path.stat().st_size, 1)), 2)
    last = max(recorded - 1, 1)
    selected = {round(number * last / (shown - 1)) for number in range(shown)} if recorded > shown else range(recorded)
    lines = [line for number, line in enumerate(json_lines(path, [])) if number in selected and _is_valid(line)]
    return RecordedSamples(clips, lines, recorded)


def _is_valid(line: Line) -> bool:
    samples = line.get("samples")
    return (
        isinstance(line.get("step"), int)
        and isinstance(samples, list)
        and samples != []
        and all(map(_is_valid_sample, samples))
    )


def _is_valid_sample(sample: object) -> bool:
    """Return whether a response has the columns that the viewer needs, with one entry per token or per segment."""
    if not isinstance(sample, dict) or not sample.keys() >= SAMPLE_KEYS or not isinstance(sample["segments"], dict):
        return False
    tokens = [sample[key] for key in TOKEN_KEYS]
    segments = list(sample["segments"].values())
    if not sample["segments"].keys() >= SEGMENT_KEYS or not all(isinstance(c, list) for c in [*tokens, *segments]):
        return False
    return len({len(column) for column in tokens}) == 1 and len({len(column) for column in segments}) == 1
