"""Are the tests and ``megatron-rl prove`` able to fail? Plants known mistakes one by one and shows what notices each.

    python benchmarks/mutations.py [NAME ...] [--output docs/mutations.md --date 2026-11-21]

Each mistake is one line of the package, changed in memory of a subprocess (``tests/mutations``). First everything runs
without a mistake and must pass. Exit status 1 if a mistake survives, 2 if a check fails without one.
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

ROOT = Path(__file__).resolve().parent.parent
PLANTER = ROOT / "tests" / "mutations"
sys.path.insert(0, str(ROOT))

from tests.mutations.mistakes import MISTAKES, Mistake  # noqa: E402 (tests are no installed package)

PURPOSE = (
    "This page lists mistakes that were planted in the package one by one, and the first check that noticed each: a "
    "test, or\n`megatron-rl prove`."
)
PROVE = ("configs/demo.toml", "--shrink", "layers=2,hidden=64")


BROKEN = r"\b(Name|Attribute|Import|ModuleNotFound|Syntax|Type)Error"
"""Complaints that say that a mistake does not fit the code any more, not that somebody noticed it."""


@dataclass(frozen=True)
class Result:
    """What a check said.

    Attributes:
        passed: whether it found nothing wrong.
        failed: whether it found something wrong, as opposed to not running at all.
        words: the first thing that it complained about.
    """

    passed: bool
    failed: bool
    words: str


def run_check(check: str, mistake: str) -> Result:
    """Run a check with a mistake planted; an empty name plants none."""
    return run_checks([check], mistake)


def run_checks(checks: Sequence[str], mistake: str) -> Result:
    """Run checks of one kind, pytest's or ``prove``'s, in one process."""
    path = os.pathsep.join([str(PLANTER), str(ROOT)])
    environment = os.environ | {"MEGATRON_RL_MISTAKE": mistake, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400", "MEGATRON_RL_DEVICE": "cpu"}
    proves = checks[0].startswith("prove ")
    if proves:
        layouts, objectives = (dict.fromkeys(check.split()[place] for check in checks) for place in (1, 2))
        options = [f"--layout={layout}" for layout in layouts] + [f"--objective={name}" for name in objectives]
        words = ["megatron_rl", "prove", *PROVE, *options]
        complaint = r"FAILS: \W*(.*)"
    else:
        words = ["pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", *checks]
        complaint = r"^FAILED \S*?::(\w+.*)$"
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    found = re.search(complaint, done.stdout, re.MULTILINE)
    if done.returncode == 1 and found and not re.search(BROKEN, found[1]):
        return Result(False, True, found[1])
    return Result(done.returncode == 0, False, (done.stdout + done.stderr)[-2000:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mistakes; none: all")
    parser.add_argument("--output", type=Path, help="write the table here")
    parser.add_argument("--date", default="", help="of the table")
    options = parser.parse_args(argv)
    chosen = [mistake for mistake in MISTAKES if not options.names or mistake.name in options.names]
    began = time.perf_counter()
    checks = list(dict.fromkeys(check for mistake in chosen for check in mistake.checks))
    for proves in (False, True):
        some = [check for check in checks if check.startswith("prove ") == proves]
        if some and not (control := run_checks(some, "")).passed:
            sys.stderr.write(f"without any mistake, {', '.join(some)} fails:\n{control.words}\n")
            return 2
        print(f"control: {len(some)} checks pass without a mistake", flush=True)
    rows = [row(mistake) for mistake in chosen]
    caught = sum(noticed for noticed, _ in rows)
    summary = f"{caught} of {len(rows)} mistakes noticed, {time.perf_counter() - began:.0f} s"
    print(summary)
    if options.output:
        options.output.write_text(document([line for _, line in rows], summary, options.date), encoding="utf-8")
    return 0 if caught == len(rows) else 1


def row(mistake: Mistake) -> tuple[bool, str]:
    """Return whether a mistake was noticed, and its line of the table."""
    broken = ""
    for check in mistake.checks:
        result = run_check(mistake=mistake.name, check=check)
        if result.failed:
            print(f"{mistake.name}: noticed by {check}: {result.words}", flush=True)
            return True, f"| {mistake.name} | `{mistake.module}` | `{check}` |"
        broken = "" if result.passed else f" (did not run: {result.words[-300:]!r})"
    print(f"{mistake.name}: SURVIVED{broken}", flush=True)
    return False, f"| {mistake.name} | `{mistake.module}` | nothing: **SURVIVED**{broken} |"


def document(lines: Sequence[str], summary: str, date: str) -> str:
    """Return the page."""
    table = "\n".join(["| mistake | module | noticed by |", "|---|---|---|", *lines])
    proven = f"`prove LAYOUT OBJECTIVE` is `megatron-rl prove {' '.join(PROVE)} --layout LAYOUT --objective OBJECTIVE`."
    end = f"{summary} (2 CPU cores, {date}). Made by `python benchmarks/mutations.py --output docs/mutations.md`."
    return f"# Mutation check\n\n{PURPOSE}\n\n{table}\n\n{proven}\n\n{end}\n"


if __name__ == "__main__":
    sys.exit(main())
