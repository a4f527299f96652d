"""docs/study.md and its pictures, from the results alone."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.cells import PAPERS, Line
from benchmarks.study.intervals import mean_of
from benchmarks.study.measures import Cells, Key, grouped, smooth, trained_tokens
from benchmarks.study.svg import Axes, Curve, plot
from benchmarks.study.tables import GRID_KEYS, fill, in_words

DOCS = Path(__file__).parents[2] / "docs"
CURVES = {
    "accuracy": ("reward_mean", "accuracy while training, mean of 3 batches", 1.0),
    "entropy": ("entropy_mean", "entropy, nats a token", 0.4),
    "gradient": ("gradient_fraction", "trained tokens with a gradient", 1.0),
}
"""Picture -> what of the results, the name of its axis, its top."""


def write(lines: Sequence[Line], docs: Path = DOCS) -> None:
    """Fill the page's tables and draw its pictures."""
    page = docs / "study.md"
    page.write_text(fill(page.read_text(), lines))
    folder = docs / "study"
    folder.mkdir(exist_ok=True)
    for name, text in pictures(lines).items():
        (folder / name).write_text(text)


def pictures(lines: Sequence[Line]) -> dict[str, str]:
    """Return every picture by its file's name: the grid's conditions that have runs."""
    found = grouped(lines)
    drawn: dict[str, str] = {}
    for key in GRID_KEYS:
        variants = {name: found[key][name] for name in PAPERS if name in found.get(key, {})}
        if not variants:
            continue
        for what, (column, title, top) in CURVES.items():
            axes = Axes(f"{in_words(key)}: mean and 95 % interval over seeds", "trained tokens", title, top)
            curves = {name: _curve(cells, column) for name, cells in variants.items()}
            drawn[f"{what}-{file_name(key)}.svg"] = plot(axes, curves)
    return drawn


def file_name(key: Key) -> str:
    """Return the part of a picture's name that tells its condition."""
    updates, lr, lag = key
    return f"{updates}-updates-lr-{lr:g}" + (f"-lag-{lag}" if lag else "")


def _curve(cells: Cells, column: str) -> Curve:
    runs = cells.curve(column)
    shown = [smooth(run) for run in runs] if column == "reward_mean" else runs
    tokens = [trained_tokens(line) for _, line in sorted(cells.lines.items()) if "error" not in line]
    xs = [math.fsum(values) / len(values) for values in zip(*tokens, strict=True)]
    return Curve(xs, [mean_of(values) for values in zip(*shown, strict=True)])
