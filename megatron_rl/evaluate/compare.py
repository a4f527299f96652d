"""``megatron-rl eval --compare A B``: paired comparison of two results on the same prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path

from rich.table import Table

from megatron_rl.config.saved_run import is_run
from megatron_rl.errors import DataError
from megatron_rl.evaluate.metrics import PromptCounts, count_by_prompt, subsets
from megatron_rl.evaluate.result_folder import RESULT, differences, read_description, read_samples
from megatron_rl.evaluate.statistics import BOOTSTRAPS, Estimate, holm, paired_interval, sign_flip_p
from megatron_rl.evaluate.tables import format_p
from megatron_rl.evaluate.targets import RESULTS
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.console import make_console

MAX_CHANGES = 12
"""Differences between the two evaluations that are printed."""


@dataclass(frozen=True)
class ResultComparison:
    """pass@1 of results A and B on a set of prompts.

    Attributes:
        task: task of the prompts; None for all tasks.
        difficulty: difficulty of the prompts; None for all.
        prompts: number of prompts.
        a: pass@1 of A.
        b: pass@1 of B.
        difference: b - a with its confidence interval.
        better: number of prompts on which the share of correct samples is larger in B than in A.
        worse: number of prompts on which it is smaller.
        p: two-sided p-value of the exact sign-flip permutation test.
        p_holm: ``p`` adjusted by Holm's method for the number of subsets; None for the set of all prompts.
    """

    task: str | None
    difficulty: str | None
    prompts: int
    a: float
    b: float
    difference: Estimate
    better: int
    worse: int
    p: float
    p_holm: float | None = None


def compare(a: Path, b: Path, output: Path | None = None) -> int:
    """Print the comparison of results ``a`` and ``b``, write it as JSON to ``output`` if given, and return 0.

    Raises:
        DataError: a folder has no finished result, or the prompts differ.
    """
    first, second = _read_counts(a), _read_counts(b)
    _require_same_prompts(a, b, first, second)
    by_id = {counts.prompt_id: counts for counts in second}
    comparisons = [
        _compare_subset(task, difficulty, subset, [by_id[counts.prompt_id] for counts in subset])
        for task, difficulty, subset in subsets(first)
    ]
    adjusted = holm([row.p for row in comparisons[1:]])
    comparisons = comparisons[:1] + [replace(row, p_holm=p) for row, p in zip(comparisons[1:], adjusted, strict=True)]
    test = "McNemar's exact test" if first[0].samples == second[0].samples == 1 else "exact sign-flip permutation test"
    method = f"pass@1; difference B - A with 95 % paired bootstrap over prompts ({BOOTSTRAPS:,} draws); p: {test}"
    changes = differences(read_description(a), read_description(b))
    console = make_console()
    console.print(f"A: {a}\nB: {b}", markup=False)
    for change in changes[:MAX_CHANGES]:
        console.print(f"  {change}", markup=False)
    console.print(_table(comparisons))
    console.print(method, markup=False)
    if output is not None:
        rows = [asdict(row) for row in comparisons]
        result = {"a": str(a), "b": str(b), "method": method, "changes": changes, "comparisons": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, json.dumps(result, indent=2) + "\n")
    return 0


def find_result(folder: Path, step: int | None = None) -> Path:
    """Return the newest finished evaluation of a run folder, or that of a step; a results folder as it is.

    Raises:
        DataError: the run has no finished evaluation, or none of this step.
    """
    if not is_run(folder):
        return folder
    found = sorted(path.parent for path in (folder / RESULTS).glob(f"step_*/{RESULT}"))
    if step is not None:
        found = [path for path in found if path.name == f"step_{step:08}"]
    if not found:
        which, option = ("", "") if step is None else (f" of step {step}", f" --step {step}")
        raise DataError(f"{folder} has no finished evaluation{which}; run: megatron-rl eval {folder}{option}")
    return found[-1]


def _read_counts(folder: Path) -> list[PromptCounts]:
    description, counts = read_description(folder), count_by_prompt(read_samples(folder))
    finished = sum(prompt.samples == description["samples"] for prompt in counts)
    if finished != description["prompts"]:
        raise DataError(
            f"{folder} is not finished: {finished} of {description['prompts']} prompts are answered; run the same eval"
            " command again to finish it"
        )
    return counts


def _require_same_prompts(a: Path, b: Path, first: Sequence[PromptCounts], second: Sequence[PromptCounts]) -> None:
    if read_description(a)["prompts_sha256"] == read_description(b)["prompts_sha256"]:
        return
    prompts_a, prompts_b = _prompts(a), _prompts(b)
    shared = sum(prompts_b.get(name) == content for name, content in prompts_a.items())
    raise DataError(
        f"the prompts differ: {a} has {len(first)}, {b} has {len(second)}, {shared} have the same id, text and"
        " answer; evaluate both with the same task, train.seed, evaluate.prompts and tokenizer"
    )


def _prompts(folder: Path) -> Mapping[str, tuple[str, str]]:
    return {sample.prompt_id: (sample.prompt, sample.answer) for sample in read_samples(folder)}


def _compare_subset(
    task: str | None, difficulty: str | None, a: Sequence[PromptCounts], b: Sequence[PromptCounts]
) -> ResultComparison:
    scale = lcm(a[0].samples, b[0].samples)
    units = [y.correct * (scale // y.samples) - x.correct * (scale // x.samples) for x, y in zip(a, b, strict=True)]
    return ResultComparison(
        task=task,
        difficulty=difficulty,
        prompts=len(a),
        a=sum(counts.mean for counts in a) / len(a),
        b=sum(counts.mean for counts in b) / len(b),
        difference=paired_interval([unit / scale for unit in units]),
        better=sum(unit > 0 for unit in units),
        worse=sum(unit < 0 for unit in units),
        p=sign_flip_p(units),
    )


def _table(comparisons: Sequence[ResultComparison]) -> Table:
    by = [name for name in ("task", "difficulty") if any(vars(row)[name] for row in comparisons)]
    table = Table(*by, "prompts", "A", "B", "B - A", "better", "worse", "p", *(["p, Holm"] if by else []))
    for row in comparisons:
        names = [str(vars(row)[name] or "all") for name in by]
        change = f"{row.difference.mean:+.3f}  {row.difference.low:+.3f} to {row.difference.high:+.3f}"
        cells = [str(row.prompts), f"{row.a:.3f}", f"{row.b:.3f}", change, str(row.better), str(row.worse)]
        tail = ["" if row.p_holm is None else format_p(row.p_holm)] if by else []
        table.add_row(*names, *cells, format_p(row.p), *tail)
    return table
