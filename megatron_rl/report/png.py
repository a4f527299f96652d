"""Plots as files: SVG as it is, PNG through resvg."""

import importlib
from importlib.util import find_spec
from pathlib import Path

from megatron_rl.errors import ConfigError

ZOOM = 2.0
"""Pixels of a PNG for each pixel of the SVG."""


def check_png() -> None:
    """Raise ConfigError if the package that makes PNG is not installed."""
    if find_spec("resvg_py") is None:
        raise ConfigError("PNG needs the package resvg-py: pip install 'megatron-rl[report]', or write SVG")


def write_plot(svg: str, path: Path) -> None:
    """Write a plot of ``report.plot``; the ending of the path, ``.svg`` or ``.png``, says as what.

    Raises:
        ConfigError: another ending, or the package for PNG is missing.
    """
    if path.suffix == ".svg":
        path.write_text(svg, encoding="utf-8")
        return
    if path.suffix != ".png":
        raise ConfigError(f"{path} ends in {path.suffix!r}; write .svg or .png")
    check_png()
    path.write_bytes(importlib.import_module("resvg_py").svg_to_bytes(svg_string=svg, zoom=ZOOM))
