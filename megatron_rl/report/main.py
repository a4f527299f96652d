"""``megatron-rl report RUN...``: run folders to one HTML page, or to plots as PNG."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.report.groups import group_runs
from megatron_rl.report.page import RunReport
from megatron_rl.report.png import check_png, write_plot
from megatron_rl.report.runs import read_runs
from megatron_rl.report.samples import PAGE_BYTES, read_samples


def report(folders: Sequence[Path], output: Path | None, png: Path | None) -> int:
    """Write the page to ``output`` (``report.html`` if neither is given), plots to the folder ``png``; return 0.

    Raises:
        DataError: a folder holds no run, or the report cannot be written.
        ConfigError: the package for PNG is missing.
    """
    if png is not None:
        check_png()
    groups = group_runs(read_runs(folders))
    share = PAGE_BYTES // len(folders)
    made = RunReport(groups, [[read_samples(run, most_bytes=share) for run in group.runs] for group in groups])
    try:
        if png is not None:
            _write_plots(made, png)
        if output is not None or png is None:
            page = output or Path("report.html")
            page.write_text(made.html(), encoding="utf-8")
            sys.stdout.write(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser\n")
    except OSError as error:
        raise DataError(f"cannot write the report: {error}; name another place: --output, --png") from error
    return 0


def _write_plots(made: RunReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for plots in made.plots().values():
        for name, svg in plots.items():
            write_plot(svg, folder / f"{name}.png")
            count += 1
    sys.stdout.write(f"{folder}: {count} plots\n")
