"""``tokens.jsonl`` as a report reads it: counts of clipped segments of all steps, responses of some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_rl.observability.file_names import TOKENS
from megatron_rl.report.plot import short
from megatron_rl.report.runs import Line, RunFolder, json_lines

MOST_STEPS = 60
"""Steps of a run whose responses are shown."""

PAGE_BYTES = 24_000_000
"""Of all responses in a page, about: of long ones, or of many runs, fewer steps are shown, but at least two of each."""


TOKEN_KEYS = ("text", "old", "new", "entropy", "rollout", "segment")
SEGMENT_KEYS = {"tokens", "entropy", "ratio", "clipped"}
SAMPLE_KEYS = {*TOKEN_KEYS, "id", "prompt", "reward", "advantage", "tokens", "all_segments", "segments"}


@dataclass(frozen=True)
class ClipBins:
    """Segments and clipped ones in bins, over all steps of a run.

    Attributes:
        names: of the bins.
        segments: how many there were.
        clipped: how many of them were clipped; a partly clipped one counts by its share.
    """

    names: Sequence[str]
    segments: Sequence[float]
    clipped: Sequence[float]

    def share(self, place: int) -> float:
        """Return the clipped share of a bin that is not empty."""
        return self.clipped[place] / self.segments[place]


@dataclass
class ClipCounts:
    """The sums over a run's lines of ``tokens.jsonl``."""

    _edges: dict[str, Sequence[float]] = field(default_factory=dict)
    _sums: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Take a step's counts."""
        for kind in ("by_length", "by_entropy"):
            counts = line.get(kind)
            if not isinstance(counts, Mapping) or not {"edges", "segments", "clipped"} <= counts.keys():
                continue
            # A run that was continued with other bins keeps those that it began with.
            if counts["edges"] != self._edges.setdefault(kind, counts["edges"]):
                continue
            own = self._sums.setdefault(kind, {})
            for name in ("segments", "clipped"):
                before = own.get(name, [0.0] * len(counts[name]))
                own[name] = [a + b for a, b in zip(before, counts[name], strict=True)]

    def bins(self, kind: str) -> ClipBins | None:
        """Return ``by_length`` or ``by_entropy``; None: no line has it."""
        if kind not in self._sums:
            return None
        edges, own = self._edges[kind], self._sums[kind]
        names = _length_names(edges) if kind == "by_length" else _entropy_names(edges)
        return ClipBins(names, own["segments"], own["clipped"])


def _length_names(edges: Sequence[float]) -> list[str]:
    """Return names of bins of whole numbers, the upper edge inside: 1, 2, 3-4, 5-8, ..."""
    whole = [int(edge) for edge in edges]
    inner = [f"{low + 1}-{high}" if high > low + 1 else str(high) for low, high in pairwise(whole)]
    return [f"{whole[0]}", *inner, f">{whole[-1]}"]


def _entropy_names(edges: Sequence[float]) -> list[str]:
    inner = [f"{short(low)}-{short(high)}" for low, high in pairwise(edges)]
    return [f"<{short(edges[0])}", *inner, f">{short(edges[-1])}"]


@dataclass(frozen=True)
class RecordedSamples:
    """What is shown of a run's ``tokens.jsonl``.

    Attributes:
        clips: over all steps.
        lines: of the steps whose responses are shown.
        recorded: how many steps the file has.
    """

    clips: ClipCounts
    lines: Sequence[Line]
    recorded: int


def read_samples(run: RunFolder, most_steps: int = MOST_STEPS, most_bytes: int = PAGE_BYTES) -> RecordedSamples:
    """Return the clips of all steps and the responses of evenly many, the first and the last among them.

    Only the responses that are shown are kept in memory. A line that is no record of a step is left out.
    """
    clips, path = ClipCounts(), run.path / TOKENS
    if not path.is_file():
        return RecordedSamples(clips, (), 0)
    recorded = 0
    for line in json_lines(path, []):
        clips.add(line)
        recorded += 1
    shown = max(min(most_steps, most_bytes * recorded // max(path.stat().st_size, 1)), 2)
    last = max(recorded - 1, 1)
    wanted = {round(number * last / (shown - 1)) for number in range(shown)} if recorded > shown else range(recorded)
    lines = [line for number, line in enumerate(json_lines(path, [])) if number in wanted and _is_whole(line)]
    return RecordedSamples(clips, lines, recorded)


def _is_whole(line: Line) -> bool:
    samples = line.get("samples")
    return (
        isinstance(line.get("step"), int) and isinstance(samples, list) and samples != [] and all(map(_fits, samples))
    )


def _fits(sample: object) -> bool:
    """Return whether a response has what the viewer asks for, one entry for each token and for each segment."""
    if not isinstance(sample, dict) or not sample.keys() >= SAMPLE_KEYS or not isinstance(sample["segments"], dict):
        return False
    tokens = [sample[key] for key in TOKEN_KEYS]
    segments = list(sample["segments"].values())
    if not sample["segments"].keys() >= SEGMENT_KEYS or not all(isinstance(c, list) for c in [*tokens, *segments]):
        return False
    return len({len(column) for column in tokens}) == 1 and len({len(column) for column in segments}) == 1
