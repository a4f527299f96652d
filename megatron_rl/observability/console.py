"""A run on the console: one line per step, below them on a terminal a status line, and log messages.

The lines of steps and messages are ordinary output, so the newest one is always visible and the scrollback is complete;
only the status line is redrawn. All lines are also written to ``console.log``.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_rl.observability.console_columns import Metric, StepRow, duration, fitting_columns, header_line, row_line
from megatron_rl.observability.disk import AppendedFile
from megatron_rl.util.logs import message_of

AVERAGED_STEPS = 20
"""Number of latest steps whose mean time estimates that of the remaining ones."""
PLAIN_WIDTH = 1000
"""Width of the lines without a terminal, where nothing has to fit."""

Gauge = tuple[str, str, float, Mapping[str, str]]
"""Name, description, value and labels."""


class ConsoleTable:
    """The lines of a run's steps, and on a terminal the status line below them."""

    def __init__(self, total_steps: int, first_step: int = 0, *, terminal: bool | None = None) -> None:
        self.console = Console(highlight=False, force_terminal=terminal)
        self.total_steps = total_steps
        self.read_gauges: Callable[[], Iterable[Gauge]] | None = None
        self._is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._width = self.console.width if self._is_live else PLAIN_WIDTH
        self._columns = fitting_columns(self._width, total_steps)
        self._log_columns = fitting_columns(PLAIN_WIDTH, total_steps)
        self._totals: list[float] = []
        self._step, self._seconds_left = first_step, 0.0
        self._phase, self._phase_began = "start", time.monotonic()
        self._rows_below_header = 0
        self._live: Live | None = None
        if self._is_live:
            self._live = Live(get_renderable=self._status, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def show_phase(self, phase: str) -> None:
        """Show the current phase in the status line."""
        self._phase, self._phase_began = phase, time.monotonic()

    def add_row(self, step: int, metrics: Mapping[str, Metric], seconds: Mapping[str, float]) -> list[str]:
        """Show the row of a step; return its lines for the log, which have all columns.

        The header precedes the first row, and is repeated once per screen on a terminal.
        """
        self._totals.append(seconds.get("total", 0.0) - seconds.get("start", 0.0))
        latest = self._totals[-AVERAGED_STEPS:]
        self._step = step + 1
        self._seconds_left = sum(latest) / len(latest) * max(self.total_steps - step - 1, 0)
        row = StepRow(step, self.total_steps, metrics, seconds, self._seconds_left)
        is_first = len(self._totals) == 1
        if is_first or (self._is_live and self._rows_below_header >= self.console.height - 3):
            self.console.out(header_line(self._columns, self._width))
            self._rows_below_header = 0
        self.console.out(row_line(self._columns, row, self._width))
        self._rows_below_header += 1
        header = [header_line(self._log_columns, PLAIN_WIDTH)] if is_first else []
        return [*header, row_line(self._log_columns, row, PLAIN_WIDTH)]

    def close(self) -> None:
        """End the status line."""
        if self._live:
            self._live.stop()
            self._live = None

    def _status(self) -> Text:
        """Return the status line: step, phase and its time, sequences in progress, time left."""
        seconds = time.monotonic() - self._phase_began
        parts = [f"step {self._step}/{self.total_steps}", f"{self._phase} {duration(seconds)}"]
        gauges = list(self.read_gauges()) if self.read_gauges else []
        if sequences := sum(value for name, _, value, _ in gauges if name == "server_sequences"):
            parts.append(f"{sequences:,.0f} sequences in progress")
        if groups := sum(value for name, _, value, labels in gauges if _is_finished_group(name, labels)):
            parts.append(f"{groups:,.0f} groups ready")
        if self._totals:
            parts.append(f"{duration(self._seconds_left)} left")
        return Text("  ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def _is_finished_group(name: str, labels: Mapping[str, str]) -> bool:
    return name == "queue_groups" and labels.get("state") == "finished"


class ConsoleHandler(logging.Handler):
    """Shows log messages on the console, above a status line, and appends them to ``console.log``."""

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
