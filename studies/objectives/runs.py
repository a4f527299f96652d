"""Runs the cells that have no result yet and appends one line per finished run."""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from megatron_rl.launch.versions import found_versions
from megatron_rl.observability.file_names import METRICS, NONFINITE
from megatron_rl.util.child_process import ending_with_parent
from studies.objectives.cells import Cell, RunResult

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
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
"""Keys of ``metrics.jsonl`` that a result keeps, one number per rollout batch."""

DIGITS = 5
TIMEOUT_SECONDS = 900.0

Metrics = Sequence[Mapping[str, object]]
Runner = Callable[[Cell], tuple[Metrics, float]]
"""Runs a cell; returns the lines of its ``metrics.jsonl`` and the CPU seconds of its processes."""


class RunFailed(Exception):
    """A run ended with an exit code other than 0.

    Attributes:
        diverged: True if a loss or a gradient was not finite, which is a result; anything else is an accident.
    """

    def __init__(self, message: str, diverged: bool = False) -> None:
        super().__init__(message)
        self.diverged = diverged


def read_results(folder: Path = RESULTS) -> list[RunResult]:
    """Return every result of all files; a last line that was cut off is left out."""
    found: list[RunResult] = []
    for file in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def pending(cells: Iterable[Cell], done: Iterable[RunResult]) -> list[Cell]:
    """Return the cells without a result, in their order."""
    known = {line["key"] for line in done}
    return [cell for cell in cells if cell.key not in known]


def run_pending(cells: Sequence[Cell], run: Runner, folder: Path = RESULTS) -> int:
    """Run every pending cell, append its result to the file of its suite, and return the number of cells.

    A run that failed by accident has no result and remains pending.
    """
    left = pending(cells, read_results(folder))
    folder.mkdir(parents=True, exist_ok=True)
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=FOLDER, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: version for name, version in found_versions().items() if version}
    for number, cell in enumerate(left):
        began = time.time()
        try:
            line = result(cell, run)
        except RunFailed as failure:
            print(f"{cell.key}: {failure}; the run remains pending", flush=True)
            continue
        seconds = time.time() - began
        line |= {"seconds": round(seconds, 1), "date": str(date.today()), "commit": commit, "versions": versions}
        _append(folder / f"{cell.suite}.jsonl", json.dumps(line))
        outcome = line.get("error") or f"accuracy {line.get('accuracy')}"
        where = f"{cell.variant}, {cell.condition}, seed {cell.seed}"
        print(f"{number + 1}/{len(left)} {where}: {str(outcome)[-200:]} ({seconds:.0f} s)", flush=True)
    return len(left)


def result(cell: Cell, run: Runner) -> RunResult:
    """Run a cell and return its line; a run that diverged is a result with ``error`` and without accuracy.

    Raises:
        RunFailed: the run failed by accident.
    """
    condition = cell.condition
    line: RunResult = {
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


def train(model: Path) -> Runner:
    """Return a runner that trains ``model`` by ``megatron-rl train`` on one rank with one embedded server."""

    def run(cell: Cell) -> tuple[Metrics, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory(prefix="megatron-rl-study-") as temporary:
            folder = Path(temporary) / "run"
            words = [str(FOLDER / cell.config), *cell.words, f"log.path={folder}", f"model.path={model}"]
            command = ending_with_parent([sys.executable, "-m", "megatron_rl", "train", *words])
            try:
                ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"not finished after {TIMEOUT_SECONDS:.0f} s") from None
            metrics = folder / METRICS
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            if ended.returncode:
                log = ended.stdout + ended.stderr
                diverged = (folder / NONFINITE).exists() or "norm of the gradients is" in log
                message = f"exit code {ended.returncode} after {len(lines)} steps: {log[-1500:]}"
                raise RunFailed(message, diverged)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return lines, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def _number(value: object) -> float:
    """Return a number rounded to the digits that are kept; NaN if it is not a number."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, int | float) else math.nan


def _append(file: Path, line: str) -> None:
    """Append a line after removing what a killed run left of one."""
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    with file.open("a") as stream:
        stream.write(line + "\n")
