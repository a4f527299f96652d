"""A run on the console: one table row per step, live on a terminal, and log messages, also in ``console.log``."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_rl.observability.disk import AppendedFile
from megatron_rl.util.logs import message_of

ROWS_ON_SCREEN = 20


@dataclass(frozen=True)
class Column:
    """A column of the table: its header, its width, and the metric and format of its cells."""

    header: str
    width: int
    metric: str = ""
    format: str = ""


COLUMNS = (
    Column("step", 9),
    Column("reward", 7, "reward_mean", "{:.3f}"),
    Column("accuracy", 9, "accuracy", "{:.3f}"),
    Column("length", 7, "response_tokens_mean", "{:,.0f}"),
    Column("cut", 5, "truncated_fraction", "{:.0%}"),
    Column("equal", 5, "zero_variance_fraction", "{:.0%}"),
    Column("entropy", 8, "entropy_mean", "{:.3f}"),
    Column("clipped", 8, "clipped_fraction", "{:.1%}"),
    Column("mismatch", 9, "mismatch_max", "{:.1e}"),
    Column("tokens/s", 9),
    Column("seconds by phase", 46),
    Column("left", 8),
)
"""``length``: mean tokens of a response; ``cut``: truncated responses; ``equal``: groups without a signal."""

PHASES_COLUMN = len(COLUMNS) - 2
NOT_PHASES = ("total", "fleet")
"""Keys of ``seconds`` that are not phases of the trainer."""


class ConsoleTable:
    """The table of a run: live on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, *, terminal: bool | None = None) -> None:
        self.console = Console(highlight=False, force_terminal=terminal)
        self.total_steps = total_steps
        self.rows: list[tuple[str, ...]] = []
        self._totals: list[float] = []
        self._status = "starting"
        self._has_header = False
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()

    def show_phase(self, phase: str) -> None:
        """Show the current phase below the live table."""
        self._status = phase
        if self._live:
            self._live.update(self._render())

    def add_row(self, step: int, metrics: Mapping[str, float | int | None], seconds: Mapping[str, float]) -> list[str]:
        """Show the row of a step; return its lines for the log, the header before the first row."""
        self._totals.append(seconds.get("total", 0.0))
        cells = make_cells(step, self.total_steps, metrics, seconds, self._seconds_left(step))
        self.rows.append(cells)
        lines = [] if self._has_header else [_line([column.header for column in COLUMNS])]
        self._has_header = True
        lines.append(_line(cells))
        if self._live:
            self._live.update(self._render())
        else:
            for line in lines:
                self.console.out(line)
        return lines

    def close(self) -> None:
        """End the live table; its last state remains on the screen."""
        if self._live:
            self._status = ""
            self._live.update(self._render(), refresh=True)
            self._live.stop()
            self._live = None

    def _seconds_left(self, step: int) -> float:
        """Return the estimated time of the remaining steps, at the mean time of the latest ones."""
        latest = self._totals[-ROWS_ON_SCREEN:]
        return sum(latest) / len(latest) * max(self.total_steps - step - 1, 0)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(COLUMNS):
            table.add_column(column.header, justify="left" if number == PHASES_COLUMN else "right")
        for cells in self.rows[-ROWS_ON_SCREEN:]:
            table.add_row(*cells)
        return Group(table, Text(f"  {self._status} ..." if self._status else "", style="dim"))


class ConsoleHandler(logging.Handler):
    """Shows log messages on the console, above a live table, and appends them to ``console.log``."""

    def __init__(self, console: Console, file: AppendedFile) -> None:
        super().__init__()
        self._console, self._file = console, file
        self._is_writable = True

    def emit(self, record: logging.LogRecord) -> None:
        """Show and append a message."""
        message = message_of(record)
        self._console.out(message)
        self.append(message)

    def append(self, line: str) -> None:
        """Append a line with the time of day to the file, without showing it; the first failure ends the file."""
        self.acquire()
        try:
            if self._is_writable:
                self._file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        except OSError:  # the files of a step report it; a message must not end the run
            self._is_writable = False
        finally:
            self.release()


def make_cells(
    step: int,
    total_steps: int,
    metrics: Mapping[str, float | int | None],
    seconds: Mapping[str, float],
    seconds_left: float,
) -> tuple[str, ...]:
    """Return the cells of a row; a dash marks a missing value."""
    cells = []
    for column in COLUMNS:
        value = metrics.get(column.metric)
        cells.append("-" if value is None else column.format.format(value))
    total, tokens = seconds.get("total", 0.0), metrics.get("tokens")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name not in NOT_PHASES)
    cells[0] = f"{step}/{total_steps}"
    cells[-3] = f"{tokens / total:,.0f}" if tokens and total else "-"
    cells[-2] = f"{phases} = {total:.1f}" if phases else f"{total:.1f}"
    cells[-1] = duration(seconds_left)
    return tuple(cells)


def duration(seconds: float) -> str:
    """Return a duration as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(cells: Sequence[str]) -> str:
    padded = []
    for number, (cell, column) in enumerate(zip(cells, COLUMNS, strict=True)):
        padded.append(cell.ljust(column.width) if number == PHASES_COLUMN else cell.rjust(column.width))
    return "  ".join(padded).rstrip()
