"""Curves with bands as plain SVG: mean over seeds and its 95 % interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.study.intervals import Interval

COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00")
"""Okabe and Ito's, told apart by colour-blind readers too."""
WIDTH, HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 720, 360, 56, 34, 500, 270


@dataclass(frozen=True)
class Axes:
    """What a plot shows.

    Attributes:
        title: above it.
        x: name of the horizontal axis.
        y: name of the vertical one.
        top: largest value of y; the smallest is 0.
    """

    title: str
    x: str
    y: str
    top: float


@dataclass(frozen=True)
class Curve:
    """One line: a value and its interval for each x."""

    xs: Sequence[float]
    ys: Sequence[Interval]


def plot(axes: Axes, curves: Mapping[str, Curve]) -> str:
    """Return the picture."""
    right = max((max(curve.xs) for curve in curves.values()), default=1.0)

    def at(x: float, y: float) -> str:
        inside = min(max(y, 0.0), axes.top)
        return f"{LEFT + PLOT_WIDTH * x / right:.1f},{TOP + PLOT_HEIGHT * (1 - inside / axes.top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(axes.title)}</text>',
        *_frame(axes, right),
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        known = [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if y.low == y.low]
        band = [at(x, y.high) for x, y in known] + [at(x, y.low) for x, y in reversed(known)]
        if band:
            parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.12"/>')
        line = " ".join(at(x, y.mean) for x, y in zip(curve.xs, curve.ys, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 10 + 20 * number
        x = LEFT + PLOT_WIDTH + 16
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _frame(axes: Axes, right: float) -> list[str]:
    bottom = TOP + PLOT_HEIGHT
    parts = [
        f'<rect x="{LEFT}" y="{TOP}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{LEFT + PLOT_WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(axes.x)}</text>',
        f'<text x="14" y="{TOP + PLOT_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {TOP + PLOT_HEIGHT / 2})">{escape(axes.y)}</text>',
    ]
    for i in range(6):
        y = bottom - PLOT_HEIGHT * i / 5
        x = LEFT + PLOT_WIDTH * i / 5
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + PLOT_WIDTH}" y2="{y}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{axes.top * i / 5:.2g}</text>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{right * i / 5:,.0f}</text>')
    return parts
