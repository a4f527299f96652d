"""Compare the metrics of two runs bit for bit, except for times: python tools/compare_runs.py RUN_A RUN_B

Prints "same", or the first difference with exit code 1.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.observability.file_names import METRICS
from megatron_rl.observability.recorder import read_metrics

IGNORED_KEYS = ("seconds",)


def first_difference(a: Sequence[Mapping[str, object]], b: Sequence[Mapping[str, object]]) -> str | None:
    """Return a description of the first difference of two runs; None if there is none."""
    for line_a, line_b in zip(a, b, strict=False):
        for key in dict.fromkeys([*line_a, *line_b]):
            value_a, value_b = line_a.get(key, "missing"), line_b.get(key, "missing")
            if key not in IGNORED_KEYS and value_a != value_b:
                return f"step {line_a['step']}, {key}: {value_a!r} and {value_b!r}"
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} lines, the first {min(len(a), len(b))} are equal"
    return None


def main() -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run folder")
    runs = parser.parse_args().runs
    for run in runs:
        if not (run / METRICS).is_file():
            parser.error(f"no {METRICS} in {run}; give a run folder")
    a, b = map(read_metrics, runs)
    difference = first_difference(a, b)
    print(f"different: {difference}" if difference else f"same: {len(a)} lines")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
