"""A run on the console: a live table on a terminal, one line a step elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

ROWS_ON_SCREEN = 20


@dataclass(frozen=True)
class Column:
    """A column: its head, its width, and the metric and format of its cells."""

    head: str
    width: int
    metric: str = ""
    form: str = ""


COLUMNS = (
    Column("step", 9),
    Column("reward", 7, "reward_mean", "{:.3f}"),
    Column("accuracy", 9, "accuracy", "{:.3f}"),
    Column("entropy", 8, "entropy_mean", "{:.3f}"),
    Column("clipped", 8, "clipped_fraction", "{:.1%}"),
    Column("mismatch", 9, "mismatch_max", "{:.1e}"),
    Column("tokens/s", 9),
    Column("seconds by phase", 46),
    Column("left", 8),
)
PHASES_COLUMN = 7
BESIDE = ("total", "fleet")
"""Times that are not of a phase of the trainer."""


class Board:
    """The rows that a run has shown so far, on a terminal as a table that grows."""

    def __init__(self, total_steps: int, *, terminal: bool | None = None) -> None:
        self.console = Console(highlight=False, force_terminal=terminal)
        self.total_steps = total_steps
        self.rows: list[tuple[str, ...]] = []
        self._totals: list[float] = []
        self._status = "starting"
        self._headed = False
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()

    def doing(self, phase: str) -> None:
        """Show which phase is going on."""
        self._status = phase
        if self._live:
            self._live.update(self._render())

    def row(self, step: int, metrics: Mapping[str, float | int | None], seconds: Mapping[str, float]) -> list[str]:
        """Show the row of a step; return what belongs into the log."""
        self._totals.append(seconds.get("total", 0.0))
        cells = cells_of(step, self.total_steps, metrics, seconds, self._left(step))
        self.rows.append(cells)
        lines = [] if self._headed else [_line([column.head for column in COLUMNS])]
        self._headed = True
        lines.append(_line(cells))
        if self._live:
            self._live.update(self._render())
        else:
            for line in lines:
                self.console.out(line)
        return lines

    def say(self, message: str) -> None:
        """Show a line of text, above the live table."""
        self.console.out(message)

    def close(self) -> None:
        """Leave the last table on the screen."""
        if self._live:
            self._status = ""
            self._live.update(self._render(), refresh=True)
            self._live.stop()
            self._live = None

    def _left(self, step: int) -> float:
        """Return the seconds that the steps after this one will take, if they take as long as the latest ones."""
        latest = self._totals[-ROWS_ON_SCREEN:]
        return sum(latest) / len(latest) * max(self.total_steps - step - 1, 0)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(COLUMNS):
            table.add_column(column.head, justify="left" if number == PHASES_COLUMN else "right")
        for cells in self.rows[-ROWS_ON_SCREEN:]:
            table.add_row(*cells)
        return Group(table, Text(f"  {self._status} ..." if self._status else "", style="dim"))


def cells_of(
    step: int,
    total_steps: int,
    metrics: Mapping[str, float | int | None],
    seconds: Mapping[str, float],
    left: float,
) -> tuple[str, ...]:
    """Return a row: a dash where there is nothing to tell."""
    cells = []
    for column in COLUMNS:
        value = metrics.get(column.metric)
        cells.append("-" if value is None else column.form.format(value))
    total, tokens = seconds.get("total", 0.0), metrics.get("tokens")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name not in BESIDE)
    cells[0] = f"{step}/{total_steps}"
    cells[-3] = f"{tokens / total:,.0f}" if tokens and total else "-"
    cells[-2] = f"{phases} = {total:.1f}" if phases else f"{total:.1f}"
    cells[-1] = duration(left)
    return tuple(cells)


def duration(seconds: float) -> str:
    """Return a time such as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    padded = []
    for number, (cell, column) in enumerate(zip(cells, COLUMNS, strict=True)):
        padded.append(cell.ljust(column.width) if number == PHASES_COLUMN else cell.rjust(column.width))
    return "  ".join(padded).rstrip()
