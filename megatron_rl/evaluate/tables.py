"""Tables of metrics on the console."""

from collections.abc import Sequence

from rich.table import Table

from megatron_rl.evaluate.metrics import METHOD, EvaluationMetrics
from megatron_rl.evaluate.statistics import MIN_P, Estimate


def table(metrics: Sequence[EvaluationMetrics]) -> Table:
    """Return the table of metrics: pass@1, and with several samples pass@k and majority@k of all samples."""
    most = max(metrics[0].pass_at)
    heads = [
        "pass@1",
        *([f"pass@{most}"] if most > 1 else []),
        *(f"majority@{k}" for k in (most,) if metrics[0].majority_at),
    ]
    by = [name for name in ("task", "difficulty") if any(vars(row)[name] for row in metrics)]
    result = Table(*by, "prompts", *heads, "tokens", "truncated", "unverified")
    for row in metrics:
        cells = [row.pass_at[1]] + ([row.pass_at[most]] if most > 1 else [])
        if metrics[0].majority_at:
            cells += [row.majority_at[most]] if row.majority_at else [None]
        names = [str(vars(row)[name] or "all") for name in by]
        counts = [f"{row.truncated / row.samples:.1%}", f"{row.unverified / row.samples:.1%}"]
        result.add_row(*names, str(row.prompts), *map(format_estimate, cells), f"{row.tokens_mean:.1f}", *counts)
    return result


def format_estimate(estimate: Estimate | None) -> str:
    """Return an estimate with its interval; ``-`` for None."""
    return "-" if estimate is None else f"{estimate.mean:.3f}  {estimate.low:.3f} to {estimate.high:.3f}"


def notes(metrics: Sequence[EvaluationMetrics]) -> list[str]:
    """Return the notes below the table."""
    lines = [METHOD]
    if max(metrics[0].pass_at) > 1 and not metrics[0].majority_at:
        lines.append("no majority votes: the verifier of this task does not extract answers")
    return lines


def format_p(p: float) -> str:
    """Return a p-value as text."""
    return f"< {MIN_P:.0e}" if p <= MIN_P else f"{p:.2g}"
