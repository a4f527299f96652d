"""Figures as people see them."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_rl.evaluate.metrics import METHOD, EvaluationMetrics
from megatron_rl.evaluate.statistics import LEAST_P, Estimate


def make_console() -> Console:
    """Return the console, wide where it goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def table(found: Sequence[EvaluationMetrics]) -> Table:
    """Return the figures: pass@1, and of more samples those of all of them."""
    most = max(found[0].pass_at)
    heads = [
        "pass@1",
        *([f"pass@{most}"] if most > 1 else []),
        *(f"majority@{k}" for k in (most,) if found[0].majority_at),
    ]
    by = [
        name
        for name, given in (("task", "task"), ("difficulty", "difficulty"))
        if any(vars(row)[given] for row in found)
    ]
    shown = Table(*by, "prompts", *heads, "tokens", "truncated", "unverified")
    for row in found:
        cells = [row.pass_at[1]] + ([row.pass_at[most]] if most > 1 else [])
        if found[0].majority_at:
            cells += [row.majority_at[most]] if row.majority_at else [None]
        names = [str(vars(row)[name] or "all") for name in by]
        counts = [f"{row.truncated / row.samples:.1%}", f"{row.unverified / row.samples:.1%}"]
        shown.add_row(*names, str(row.prompts), *map(cell, cells), f"{row.tokens_mean:.1f}", *counts)
    return shown


def cell(estimate: Estimate | None) -> str:
    """Return a figure with its interval."""
    return "-" if estimate is None else f"{estimate.mean:.3f}  {estimate.low:.3f} to {estimate.high:.3f}"


def notes(found: Sequence[EvaluationMetrics]) -> list[str]:
    """Return what a reader of the table must know."""
    lines = [METHOD]
    if max(found[0].pass_at) > 1 and not found[0].majority_at:
        lines.append("no majority votes: this task's verifier does not say what a response answers")
    return lines


def p_value(p: float) -> str:
    """Return a p-value."""
    return f"< {LEAST_P:.0e}" if p <= LEAST_P else f"{p:.2g}"
