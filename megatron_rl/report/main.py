"""``megatron-rl report RUN...``: writes one HTML page about run folders, or serves it while they grow."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.report.groups import group_runs
from megatron_rl.report.live import LivePage, serve
from megatron_rl.report.page import RunReport
from megatron_rl.report.runs import read_runs
from megatron_rl.report.samples import PAGE_BYTES, read_samples
from megatron_rl.util.atomic import replace_text


def report(folders: Sequence[Path], output: Path | None) -> int:
    """Write the page to ``output``, by default ``report.html``, and return 0.

    Raises:
        DataError: a folder is not a run folder, or the page cannot be written.
    """
    html = _make_report(folders).html()
    page = output or Path("report.html")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_text(page, html)
    except OSError as error:
        raise DataError(f"cannot write the report {page}: {error.strerror}; give another file: --output") from error
    sys.stdout.write(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser\n")
    return 0


def serve_report(folders: Sequence[Path], port: int) -> int:
    """Serve the page on this machine until a signal, and update it while the runs write; return 0.

    Raises:
        DataError: a folder is not a run folder.
        RolloutError: the port is in use.
    """
    return serve(LivePage(folders, lambda: _make_report(folders).html(is_live=True)), port)


def _make_report(folders: Sequence[Path]) -> RunReport:
    groups = group_runs(read_runs(folders))
    bytes_per_run = PAGE_BYTES // len(folders)
    return RunReport(groups, [[read_samples(run, max_bytes=bytes_per_run) for run in group.runs] for group in groups])
