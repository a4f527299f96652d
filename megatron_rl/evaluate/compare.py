"""``megatron-rl eval --compare A B``: two results on the same prompts, prompt by prompt."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path

from rich.table import Table

from megatron_rl.errors import DataError
from megatron_rl.evaluate.metrics import PromptCounts, count_by_prompt, subsets
from megatron_rl.evaluate.result_folder import differences, read_description, read_samples
from megatron_rl.evaluate.statistics import BOOTSTRAPS, Estimate, holm, paired_interval, sign_flip_p
from megatron_rl.evaluate.tables import make_console, p_value
from megatron_rl.util.atomic import replace_text

SHOWN = 12


@dataclass(frozen=True)
class ResultComparison:
    """pass@1 of B against A on some prompts.

    Attributes:
        better, worse: prompts on which B has more, or fewer, correct samples than A, as shares.
        p: two-sided, of the exact sign-flip permutation test.
        p_holm: the same, adjusted for all subsets that are told of (not for all prompts together, which are first).
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
    """Print the table, and write it as JSON if asked; return 0.

    Raises:
        DataError: a folder holds no finished result, or the prompts are not the same.
    """
    first, second = _read(a), _read(b)
    _require_same_prompts(a, b, first, second)
    by_id = {tally.prompt_id: tally for tally in second}
    found = [
        _compared(task, difficulty, own, [by_id[tally.prompt_id] for tally in own])
        for task, difficulty, own in subsets(first)
    ]
    adjusted = holm([row.p for row in found[1:]])
    found = found[:1] + [replace(row, p_holm=p) for row, p in zip(found[1:], adjusted, strict=True)]
    test = "McNemar's exact test" if first[0].samples == second[0].samples == 1 else "exact sign-flip permutation test"
    method = f"pass@1; difference B - A with 95 % paired bootstrap over prompts ({BOOTSTRAPS:,} draws); p: {test}"
    changes = differences(read_description(a), read_description(b))
    console = make_console()
    console.print(f"A: {a}\nB: {b}", markup=False)
    for change in changes[:SHOWN]:
        console.print(f"  {change}", markup=False)
    console.print(_table(found))
    console.print(method, markup=False)
    if output is not None:
        rows = [asdict(row) for row in found]
        result = {"a": str(a), "b": str(b), "method": method, "changes": changes, "comparisons": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, json.dumps(result, indent=2) + "\n")
    return 0


def _read(folder: Path) -> list[PromptCounts]:
    asked, counted = read_description(folder), count_by_prompt(read_samples(folder))
    whole = [tally for tally in counted if tally.samples == asked["samples"]]
    if len(whole) != asked["prompts"]:
        said = f"{len(whole)} of {asked['prompts']} prompts are answered"
        raise DataError(f"{folder} is not finished: {said}; the command that began it goes on")
    return counted


def _require_same_prompts(a: Path, b: Path, first: Sequence[PromptCounts], second: Sequence[PromptCounts]) -> None:
    if read_description(a)["prompts_sha256"] == read_description(b)["prompts_sha256"]:
        return
    ones, others = _prompts(a), _prompts(b)
    shared = sum(others.get(name) == content for name, content in ones.items())
    raise DataError(
        f"not the same prompts: {a} has {len(first)}, {b} has {len(second)}, {shared} have the same id, text and"
        " answer; evaluate both with the same task, train.seed, evaluate.prompts and tokenizer"
    )


def _prompts(folder: Path) -> Mapping[str, tuple[str, str]]:
    return {sample.prompt_id: (sample.prompt, sample.answer) for sample in read_samples(folder)}


def _compared(
    task: str | None, difficulty: str | None, a: Sequence[PromptCounts], b: Sequence[PromptCounts]
) -> ResultComparison:
    scale = lcm(a[0].samples, b[0].samples)
    units = [y.correct * (scale // y.samples) - x.correct * (scale // x.samples) for x, y in zip(a, b, strict=True)]
    return ResultComparison(
        task=task,
        difficulty=difficulty,
        prompts=len(a),
        a=sum(tally.mean for tally in a) / len(a),
        b=sum(tally.mean for tally in b) / len(b),
        difference=paired_interval([unit / scale for unit in units]),
        better=sum(unit > 0 for unit in units),
        worse=sum(unit < 0 for unit in units),
        p=sign_flip_p(units),
    )


def _table(found: Sequence[ResultComparison]) -> Table:
    by = [name for name in ("task", "difficulty") if any(vars(row)[name] for row in found)]
    heads = [*by, "prompts", "A", "B", "B - A", "better", "worse", "p", *(["p, Holm"] if by else [])]
    shown = Table(*heads)
    for row in found:
        names = [str(vars(row)[name] or "all") for name in by]
        change = f"{row.difference.mean:+.3f}  {row.difference.low:+.3f} to {row.difference.high:+.3f}"
        cells = [str(row.prompts), f"{row.a:.3f}", f"{row.b:.3f}", change, str(row.better), str(row.worse)]
        tail = ["" if row.p_holm is None else p_value(row.p_holm)] if by else []
        shown.add_row(*names, *cells, p_value(row.p), *tail)
    return shown
