"""The columns of the console's table: which ones fit, and the text of their cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

Metric = float | int | None
NOT_PHASES = ("total", "fleet")
"""Keys of ``seconds`` that are not phases of the trainer."""


@dataclass(frozen=True)
class StepRow:
    """What the row of a step shows.

    Attributes:
        step: its number, from 0.
        total_steps: steps of the run.
        metrics: metrics of the step.
        seconds: seconds of each phase, and of the step as ``total``.
        seconds_left: estimated seconds of the remaining steps.
    """

    step: int
    total_steps: int
    metrics: Mapping[str, Metric]
    seconds: Mapping[str, float]
    seconds_left: float


@dataclass(frozen=True)
class Column:
    """A column: its header, its smallest width, its cell for a row, and its rank when there is little space.

    Attributes:
        rank: columns of a smaller number are shown first.
        left: whether cells start at the left.
    """

    header: str
    width: int
    cell: Callable[[StepRow], str]
    rank: int = 0
    left: bool = False


def _metric(name: str, form: str) -> Callable[[StepRow], str]:
    """Return a function that formats a metric; a dash marks a missing value."""

    def cell(row: StepRow) -> str:
        value = row.metrics.get(name)
        return "-" if value is None else form.format(value)

    return cell


def _tokens_per_second(row: StepRow) -> str:
    total, tokens = row.seconds.get("total", 0.0), row.metrics.get("tokens")
    return f"{tokens / total:,.0f}" if tokens and total else "-"


def _phases(row: StepRow) -> str:
    """Return the seconds of each phase that took 0.05 or more."""
    phases = {name: value for name, value in row.seconds.items() if name not in NOT_PHASES and value >= 0.05}
    return ", ".join(f"{name} {value:.1f}" for name, value in phases.items())


COLUMNS = (
    Column("step", 7, lambda row: f"{row.step}/{row.total_steps}"),
    Column("reward", 6, _metric("reward_mean", "{:.3f}")),
    Column("accuracy", 8, _metric("accuracy", "{:.3f}")),
    Column("length", 6, _metric("response_tokens_mean", "{:,.0f}"), rank=1),
    Column("cut", 5, _metric("truncated_fraction", "{:.0%}"), rank=2),
    Column("equal", 5, _metric("zero_variance_fraction", "{:.0%}"), rank=3),
    Column("entropy", 7, _metric("entropy_mean", "{:.3f}")),
    Column("clipped", 7, _metric("clipped_fraction", "{:.1%}")),
    Column("gradient", 8, _metric("grad_norm", "{:.2e}"), rank=5),
    Column("rate", 7, _metric("lr", "{:.1e}"), rank=6),
    Column("mismatch", 8, _metric("mismatch_max", "{:.1e}")),
    Column("tokens/s", 8, _tokens_per_second),
    Column("seconds", 7, lambda row: f"{row.seconds.get('total', 0.0):.1f}"),
    Column("left", 8, lambda row: duration(row.seconds_left)),
    Column("seconds by phase", 40, _phases, rank=4, left=True),
)
"""``length``: mean tokens of a response; ``cut``: truncated responses; ``equal``: groups without a signal;
``gradient``: its norm before clipping; ``rate``: learning rate."""


def fitting_columns(width: int, total_steps: int) -> list[Column]:
    """Return the columns that fit into ``width`` characters, in the order of the table; those of rank 0 always."""
    step = replace(COLUMNS[0], width=max(COLUMNS[0].width, 2 * len(str(total_steps)) + 1))
    shown = {column.header for column in COLUMNS if column.rank == 0}
    space = (
        width - (step.width - COLUMNS[0].width) - sum(column.width + 1 for column in COLUMNS if column.rank == 0) + 1
    )
    for column in sorted((column for column in COLUMNS if column.rank), key=lambda column: column.rank):
        space -= column.width + 1
        if space < 0:
            break
        shown.add(column.header)
    return [step, *(column for column in COLUMNS[1:] if column.header in shown)]


def header_line(columns: Sequence[Column], width: int) -> str:
    """Return the line of headers, cut off at ``width``."""
    return _line(columns, [column.header for column in columns], width)


def row_line(columns: Sequence[Column], row: StepRow, width: int) -> str:
    """Return the line of a row, cut off at ``width``."""
    return _line(columns, [column.cell(row) for column in columns], width)


def _line(columns: Sequence[Column], cells: Sequence[str], width: int) -> str:
    padded = [
        cell.ljust(column.width) if column.left else cell.rjust(column.width)
        for cell, column in zip(cells, columns, strict=True)
    ]
    text = " ".join(padded).rstrip()
    return text if len(text) <= width else f"{text[: width - 3]}..."


def duration(seconds: float) -> str:
    """Return a duration as 4:05, 1:02:03 or 123 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
