"""Mutation check: plants known mistakes one by one and shows which test or ``prove`` run detects each.

    python benchmarks/mutations.py [NAME ...] [--output docs/mutations.md --date 2026-11-21]

Each mistake changes one line of the package in the memory of a subprocess (``tests/mutations``). First all checks run
without a mistake and must pass. The exit status is 1 if a mistake survives and 2 if a check fails without one.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT
from tests.mutations.mistakes import MISTAKES, Mistake

PLANTER = ROOT / "tests" / "mutations"
PURPOSE = (
    "This page lists mistakes that were planted in the package one by one, and the first check that detected each: a "
    "test, or\n`megatron-rl prove`."
)
PROVE = ("configs/demo.toml", "--shrink", "layers=2,hidden=64")
BROKEN = r"\b(Name|Attribute|Import|ModuleNotFound|Syntax|Type)Error"
"""Errors which mean that a mistake no longer fits the code, not that a check detected it."""


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Attributes:
        passed: whether the check passed.
        failed: whether the check ran and failed; False if it could not run.
        message: the first failure, or the end of the output.
    """

    passed: bool
    failed: bool
    message: str


def run_check(check: str, mistake: str) -> Result:
    """Run a check with a mistake planted; an empty name plants none."""
    return run_checks([check], mistake)


def run_checks(checks: Sequence[str], mistake: str) -> Result:
    """Run checks of one kind (pytest or ``prove``) in one process."""
    path = os.pathsep.join([str(PLANTER), str(ROOT)])
    environment = os.environ | {"MEGATRON_RL_MISTAKE": mistake, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400", "MEGATRON_RL_DEVICE": "cpu"}
    proves = checks[0].startswith("prove ")
    if proves:
        layouts, objectives = (dict.fromkeys(check.split()[place] for check in checks) for place in (1, 2))
        options = [f"--layout={layout}" for layout in layouts] + [f"--objective={name}" for name in objectives]
        arguments = ["megatron_rl", "prove", *PROVE, *options]
        failure = r"FAIL: \W*(.*)"
    else:
        arguments = ["pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", *checks]
        failure = r"^FAILED \S*?::(\w+.*)$"
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(failure, done.stdout, re.MULTILINE)
    if done.returncode == 1 and found and not re.search(BROKEN, found[1]):
        return Result(False, True, found[1])
    return Result(done.returncode == 0, False, (done.stdout + done.stderr)[-2000:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the results; write the page if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mistakes to plant (default: all)")
    parser.add_argument("--output", type=Path, help="write the page here")
    parser.add_argument("--date", default="", help="date for the page")
    options = parser.parse_args(argv)
    mistakes = [mistake for mistake in MISTAKES if not options.names or mistake.name in options.names]
    began = time.perf_counter()
    checks = list(dict.fromkeys(check for mistake in mistakes for check in mistake.checks))
    for proves in (False, True):
        selected = [check for check in checks if check.startswith("prove ") == proves]
        if selected and not (control := run_checks(selected, "")).passed:
            sys.stderr.write(f"without any mistake, {', '.join(selected)} fails:\n{control.message}\n")
            return 2
        print(f"control: {len(selected)} checks pass without a mistake", flush=True)
    rows = [row(mistake) for mistake in mistakes]
    detected = sum(found for found, _ in rows)
    summary = f"{detected} of {len(rows)} mistakes detected, {time.perf_counter() - began:.0f} s"
    print(summary)
    if options.output:
        options.output.write_text(document([line for _, line in rows], summary, options.date), encoding="utf-8")
    return 0 if detected == len(rows) else 1


def row(mistake: Mistake) -> tuple[bool, str]:
    """Return whether a mistake was detected, and its row of the table."""
    broken = ""
    for check in mistake.checks:
        result = run_check(mistake=mistake.name, check=check)
        if result.failed:
            print(f"{mistake.name}: detected by {check}: {result.message}", flush=True)
            return True, f"| {mistake.name} | `{mistake.module.replace('.', '/')}.py` | `{check}` |"
        broken = "" if result.passed else f" (did not run: {result.message[-300:]!r})"
    print(f"{mistake.name}: SURVIVED{broken}", flush=True)
    return False, f"| {mistake.name} | `{mistake.module.replace('.', '/')}.py` | nothing: **SURVIVED**{broken} |"


def document(lines: Sequence[str], summary: str, date: str) -> str:
    """Return the page in Markdown."""
    table = "\n".join(["| mistake | module | detected by |", "|---|---|---|", *lines])
    proven = f"`prove LAYOUT OBJECTIVE` is `megatron-rl prove {' '.join(PROVE)} --layout LAYOUT --objective OBJECTIVE`."
    end = f"{summary} (2 CPU cores, {date}). Made by `python benchmarks/mutations.py --output docs/mutations.md`."
    return f"# Mutation check\n\n{PURPOSE}\n\n{table}\n\n{proven}\n\n{end}\n"


if __name__ == "__main__":
    sys.exit(main())
