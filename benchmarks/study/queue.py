"""The queue: runs what is not in the results yet, one cell after the other, and adds a line for each.

A line is written when its run is over. What was killed in the middle has no line and starts again.
"""

import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks.study.cells import Cell, Line
from benchmarks.study.worker import RunFailed, train_once
from megatron_rl.observability.versions import found_versions

RESULTS = Path(__file__).with_name("results")
CURVES = (
    "reward_mean",
    "entropy_mean",
    "clipped_fraction",
    "gradient_fraction",
    "gradient_kept",
    "zero_variance_fraction",
    "response_tokens_mean",
    "truncated_fraction",
    "ratio_max",
    "policy_kl_mean",
    "grad_norm",
    "lag_mean",
    "tokens",
)
"""What is kept of ``metrics.jsonl``, a list of one number a rollout batch each."""

DIGITS = 5
TIMEOUT_SECONDS = 600.0

Metrics = Sequence[Mapping[str, object]]
Runner = Callable[[Cell], tuple[Metrics, float]]
"""Runs a cell; returns the lines of its ``metrics.jsonl`` and its CPU seconds."""


def read_results(folder: Path = RESULTS) -> list[Line]:
    """Return every finished cell of all files; a last line that was cut off is left out."""
    found: list[Line] = []
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def pending(cells: Iterable[Cell], done: Iterable[Line]) -> list[Cell]:
    """Return the cells without a result, each once, in their order."""
    known = {line["key"] for line in done}
    left: dict[str, Cell] = {}
    for cell in cells:
        if cell.key not in known:
            left.setdefault(cell.key, cell)
    return list(left.values())


def run_queue(cells: Sequence[Cell], run: Runner, folder: Path, deadline: float | None = None) -> int:
    """Run what is pending until the deadline; return how many cells were run.

    Args:
        cells: the plan.
        run: runs one.
        folder: of the results.
        deadline: time (``time.time()``) after which no cell is begun.
    """
    versions = {name: version for name, version in found_versions().items() if version}
    commit = _commit()
    left = pending(cells, read_results(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(left):
        if deadline is not None and time.time() > deadline:
            return number
        began = time.time()
        try:
            line = result(cell, run)
        except RunFailed as failure:
            print(f"{cell.key}: {failure}; it stays in the queue", flush=True)
            continue
        seconds = time.time() - began
        line |= {"seconds": round(seconds, 1), "date": str(date.today()), "commit": commit, "versions": versions}
        _append(folder / f"{cell.suite}.jsonl", json.dumps(line))
        said = line.get("error") or f"accuracy {line.get('accuracy')}"
        where = f"{cell.variant}, {cell.condition.words}, seed {cell.seed}"
        print(f"{number + 1}/{len(left)} {where}: {str(said)[-200:]} ({seconds:.0f} s)", flush=True)
    return len(left)


def result(cell: Cell, run: Runner) -> Line:
    """Run a cell and return its line; a run that diverged is a result too, with ``error`` and no accuracy.

    Raises:
        RunFailed: by accident.
    """
    condition = cell.condition
    line: Line = {
        "key": cell.key,
        "suite": cell.suite,
        "variant": cell.variant,
        "updates": condition.updates,
        "lr": condition.lr,
        "lag": condition.lag,
        "seed": cell.seed,
        "words": list(cell.words),
    }
    try:
        lines, cpu_seconds = run(cell)
    except RunFailed as failure:
        if not failure.diverged:
            raise
        return line | {"error": str(failure), "accuracy": {}, "curves": {}}
    steps = [entry for entry in lines if "reward_mean" in entry]
    evaluated = [entry for entry in lines if entry.get("accuracy") is not None]
    line["accuracy"] = {str(entry["step"]): _number(entry["accuracy"]) for entry in evaluated}
    line["curves"] = {name: [_number(entry.get(name)) for entry in steps] for name in CURVES}
    line["cpu_seconds"] = round(cpu_seconds, 1)
    return line


def real_run(model: Path) -> Runner:
    """Return what runs a cell for real, on this model."""

    def run(cell: Cell) -> tuple[Metrics, float]:
        lines, seconds = train_once(cell, model, TIMEOUT_SECONDS)
        return lines, seconds

    return run


def _number(value: object) -> float:
    """Return it with the digits that are kept; NaN for what the journal has no finite number for."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, int | float) else math.nan


def _append(file: Path, line: str) -> None:
    """Add a line; what a killed run left behind of one is cut off first."""
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    with file.open("a") as sink:
        sink.write(line + "\n")


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(asked, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
