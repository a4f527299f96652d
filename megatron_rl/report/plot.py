"""Plots as SVG text: curves with bands, bars, stacked bars. Uses the standard library only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#a6428a", "#b8860b", "#3a9bd0", "#5b5b5b", "#8b4513")
"""Distinguishable with color blindness, and dark enough on white."""
DASHES = ("", "6 3", "2 2", "8 3 2 3")
INK, GRID = "#222222", "#dddddd"
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
CHARACTER = 0.6
"""Width of a character, as a multiple of the font size."""


@dataclass(frozen=True)
class Series:
    """A curve with an optional band.

    Attributes:
        label: text in the legend.
        x: increasing values.
        y: one value per x.
        low: lower end of the band at each x; None for no band.
        high: upper end of the band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel position of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, max_count: int) -> list[float]:
        """Return round values for the labels of the axis, about ``max_count`` at most."""
        if not self.log:
            return round_values(self.low, self.high, max_count)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        decades = [10.0**power for power in range(first, last + 1, max(1, -(-(last - first + 1) // max_count)))]
        if len(decades) > 1:
            return decades
        candidates = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [value for value in candidates if self.low <= value <= self.high]


def curves(
    series: Sequence[Series],
    *,
    title: str,
    y: str = "",
    x: str = "step",
    log: bool = False,
    width: int = 394,
    height: int = 250,
) -> str:
    """Return a plot of curves with bands.

    Args:
        series: at least one curve. A logarithmic plot leaves out values that are not positive.
        title: title above the plot.
        y: label of the vertical axis.
        x: label of the horizontal axis.
        log: whether the vertical axis is logarithmic.
        width: width in pixels.
        height: height in pixels.
    """
    frame = Frame(title, y, x, width, height, [s.label for s in series])
    ys = [v for s in series for v in [*s.y, *(s.low or ()), *(s.high or ())] if _drawable(v, log)]
    xs = [v for s in series for v in s.x]
    low, high = _padded(ys, log)
    across = Axis(*_nonempty_range(min(xs, default=0), max(xs, default=1)), frame.left, frame.right)
    up = Axis(low, high, frame.bottom, frame.top, log)
    drawn = [_curve(s, across, up, number) for number, s in enumerate(series)]
    return frame.svg([*frame.grid(across, up), *drawn])


def bars(
    categories: Sequence[str],
    series: Sequence[Series],
    *,
    title: str,
    y: str = "",
    x: str = "",
    width: int = 600,
    height: int = 260,
) -> str:
    """Return a bar chart. ``x`` of a series are indices of categories; bands are drawn as whiskers."""
    frame = Frame(title, y, x, width, height, [s.label for s in series])
    low, high = _padded([0.0, *(v for s in series for v in [*s.y, *(s.high or ())])], log=False)
    up = Axis(min(low, 0.0) if low < -1e-12 else 0.0, high, frame.bottom, frame.top)
    step = (frame.right - frame.left) / max(len(categories), 1)
    thick = 0.8 * step / max(len(series), 1)
    drawn = []
    for number, s in enumerate(series):
        for place, value in enumerate(s.y):
            left = frame.left + s.x[place] * step + 0.1 * step + number * thick
            drawn.append(_box(left, up(value), thick * 0.94, up(0) - up(value), color(number)))
            if s.low is not None and s.high is not None:
                middle = left + thick * 0.47
                drawn.append(_line([(middle, up(s.low[place])), (middle, up(s.high[place]))], INK))
    names = [
        _text(frame.left + (place + 0.5) * step, frame.bottom + 14, name, anchor="middle")
        for place, name in enumerate(categories)
    ]
    return frame.svg([*frame.horizontal_lines(up), *drawn, *names])


def stacked(
    rows: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], *, title: str, x: str, width: int = 800
) -> str:
    """Return a stacked horizontal bar chart, with one bar per row.

    Args:
        rows: labels of the bars.
        parts: (name, length in each row) of each part of the bars.
        title: title above the plot.
        x: label of the horizontal axis.
        width: width in pixels.
    """
    frame = Frame(title, "", x, width, 96 + 30 * len(rows), [name for name, _ in parts], left_margin=_max_width(rows))
    totals = [sum(lengths[row] for _, lengths in parts) for row in range(len(rows))]
    across = Axis(0.0, max([*totals, 1e-9]) * 1.02, frame.left, frame.right)
    step = (frame.bottom - frame.top) / max(len(rows), 1)
    drawn = []
    for row, name in enumerate(rows):
        start, top = 0.0, frame.top + row * step + 0.15 * step
        for number, (_, lengths) in enumerate(parts):
            drawn.append(
                _box(across(start), top, across(start + lengths[row]) - across(start), 0.7 * step, color(number))
            )
            start += lengths[row]
        drawn.append(_text(frame.left - 6, top + 0.35 * step + 4, name, anchor="end"))
    return frame.svg([*frame.vertical_lines(across), *drawn])


class Frame:
    """Title, legend and axes of a plot, and the area that remains for its content."""

    def __init__(
        self, title: str, y: str, x: str, width: int, height: int, labels: Sequence[str], *, left_margin: float = 58
    ) -> None:
        self.title, self.y, self.x, self.width, self.height, self.labels = title, y, x, width, height, labels
        self.left, self.right = left_margin + (14 if y else 0), width - 12.0
        self._legend = self._legend_rows() if len(labels) > 1 else []
        self.top = 30.0 + 15 * len(self._legend) + 4
        self.bottom = height - (36.0 if x else 22.0)

    def _legend_rows(self) -> list[list[tuple[float, int]]]:
        """Return rows of (left end, index of the label)."""
        rows: list[list[tuple[float, int]]] = [[]]
        left = 10.0
        for number, label in enumerate(self.labels):
            width = 26 + _max_width([label], size=10)
            if left + width > self.width - 6 and rows[-1]:
                rows.append([])
                left = 10.0
            rows[-1].append((left, number))
            left += width
        return rows

    def grid(self, across: Axis, up: Axis) -> list[str]:
        """Return the grid lines and labels of both axes."""
        return [*self.vertical_lines(across), *self.horizontal_lines(up)]

    def vertical_lines(self, across: Axis) -> list[str]:
        """Return a line and a label at each tick of the horizontal axis."""
        drawn = []
        for value in across.ticks(7):
            drawn.append(_line([(across(value), self.top), (across(value), self.bottom)], GRID))
            drawn.append(_text(across(value), self.bottom + 14, short(value), anchor="middle"))
        return drawn

    def horizontal_lines(self, up: Axis) -> list[str]:
        """Return a line and a label at each tick of the vertical axis."""
        drawn = []
        for value in up.ticks(5):
            drawn.append(_line([(self.left, up(value)), (self.right, up(value))], GRID))
            drawn.append(_text(self.left - 5, up(value) + 4, short(value), anchor="end"))
        return drawn

    def svg(self, drawn: Sequence[str]) -> str:
        """Return the SVG document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="{FONT}" font-size="10.5" fill="{INK}">'
        )
        parts = [head, f"<title>{escape(self.title)}</title>", _box(0, 0, self.width, self.height, "#ffffff")]
        parts.append(_text(10, 18, self.title, size=13, weight="bold"))
        for row, entries in enumerate(self._legend):
            for left, number in entries:
                y = 34 + 15 * row
                parts.append(_line([(left, y - 3), (left + 16, y - 3)], color(number), 3, _dash(number)))
                parts.append(_text(left + 20, y, self.labels[number], size=10))
        parts += drawn
        parts.append(_line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], "#888888"))
        if self.x:
            parts.append(_text((self.left + self.right) / 2, self.height - 6, self.x, anchor="middle"))
        if self.y:
            middle = (self.top + self.bottom) / 2
            rotation = f'transform="rotate(-90 12 {middle:.1f})"'
            parts.append(_text(12, middle, self.y, anchor="middle", attributes=rotation))
        return "".join([*parts, "</svg>"])


def color(number: int) -> str:
    """Return the color of a series."""
    return COLORS[number % len(COLORS)]


def _dash(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]


def _curve(series: Series, across: Axis, up: Axis, number: int) -> str:
    parts = []
    if series.low is not None and series.high is not None:
        ends = list(zip(series.x, series.low, series.high, strict=True))
        edge = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
        points = [(across(x), up(max(y, up.low))) for x, y in edge]
        parts.append(f'<polygon points="{_points(points)}" fill="{color(number)}" fill-opacity="0.2"/>')
    points = [(across(x), up(y)) for x, y in zip(series.x, series.y, strict=True) if _drawable(y, up.log)]
    parts.append(_line(points, color(number), 1.8, _dash(number)))
    if len(points) <= 30:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color(number)}"/>' for x, y in points]
    return "".join(parts)


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _nonempty_range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Return the ends of a vertical axis that contains all values with some padding."""
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        return (low / 1.5, high * 1.5) if math.log10(high / low) > 0.9 else (low / 1.3, high * 1.3)
    if low == high:
        return (low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12) if low else (-0.5, 0.5)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def round_values(low: float, high: float, max_count: int) -> list[float]:
    """Return at most ``max_count`` equally spaced multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / max_count))
    for factor in (1, 2, 5, 10):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first + 1 <= max_count:
            break
    return [multiple * step * factor for multiple in range(first, last + 1)]


def short(value: float) -> str:
    """Return a short text of a number."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def _max_width(texts: Sequence[str], size: float = 10.5) -> float:
    return 12 + size * CHARACTER * max(map(len, texts), default=0)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(points: Sequence[tuple[float, float]], stroke: str, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{_points(points)}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashes}/>'


def _box(left: float, top: float, width: float, height: float, fill: str) -> str:
    size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{fill}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: float = 10.5, weight: str = "", attributes: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {position}{bold} {attributes}>{escape(text)}</text>"
