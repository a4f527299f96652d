"""Plots are well-formed SVG with all content inside the frame."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from megatron_rl.report.plot import Axis, Series, bars, curves, round_values, short, stacked

BAND = Series("a <b> & c", [0, 1, 2], [1.0, 4.0, 2.0], [0.5, 3.0, 1.0], [2.0, 5.0, 3.0])
LINE = Series("other", [0, 2], [2.0, 2.5])


def coordinates(svg: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', svg)))
    return [(float(x), float(y)) for x, y in pairs]


def test_curves_with_bands_are_drawn_and_named():
    svg = curves([BAND, LINE], title="Title", y="nats")
    root = ET.fromstring(svg)
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Title", "nats", "step", "a <b> & c", "other"} <= texts
    assert len(re.findall("<polygon", svg)) == 1
    assert all(0 <= x <= 394 and 0 <= y <= 250 for x, y in coordinates(svg))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 1e3], [3.0, 3.0], [-1.0, 1.0], []])
def test_extreme_values_give_valid_plots(log, values):
    svg = curves([Series("x", list(range(len(values))), values)], title="t", log=log)
    ET.fromstring(svg)
    assert "nan" not in svg
    assert all(0 <= x <= 394 and 0 <= y <= 250 for x, y in coordinates(svg))


def test_a_wide_legend_has_several_lines():
    series = [Series(f"a rather long label {number}", [0, 1], [0.0, 1.0]) for number in range(9)]
    svg = curves(series, title="t")
    places = {m for m in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>a rather', svg)}
    assert len(places) == 9
    assert all(float(x) + 0.6 * 10 * 20 < 394 for x, _ in places)


def test_lengths_of_bars_are_proportional_to_values():
    root = ET.fromstring(bars(["x", "y"], [Series("s", [0, 1], [0.25, 0.5])], title="t"))
    heights = [float(r.get("height", 0)) for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert heights[1] / heights[0] == pytest.approx(2, rel=1e-2)
    root = ET.fromstring(stacked(["run"], [("rollout", [1.0]), ("train", [3.0])], title="t", x="seconds"))
    widths = [float(r.get("width", 0)) for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths[1] / widths[0] == pytest.approx(3, rel=1e-2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-9, 7e-9), (12.3, 12.4), (0.0, 98765.0)])
def test_ticks_are_round_and_inside(low, high):
    values = round_values(low, high, 5)
    assert 2 <= len(values) <= 5
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)


def test_a_logarithmic_axis_of_less_than_a_decade_has_ticks_too():
    assert Axis(0.8, 4.7, 0, 1, log=True).ticks(5) == pytest.approx([1, 2])
    assert Axis(1e-7, 1e-2, 0, 1, log=True)(1e-2) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (2e-4, "2e-4"), (1.5e-7, "1.5e-7"), (1e6, "1e6")]
)
def test_numbers_are_short(value, text):
    assert short(value) == text
    assert math.isclose(float(short(value)), value)
