"""Shared by the benchmarks: Markdown tables, timing, and scripts that run themselves on several ranks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, *rows]]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def synchronize(device: str) -> None:
    """Return when the GPU has finished its work; do nothing for a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(operation: Callable[[], object], device: str, repeats: int, warm_up: int = 1) -> float:
    """Return the median time of one call in seconds; the first ``warm_up`` calls do not count."""
    seconds = []
    for number in range(warm_up + repeats):
        synchronize(device)
        start = time.perf_counter()
        operation()
        synchronize(device)
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def run_on_ranks(script: str, ranks: int, arguments: Sequence[str]) -> None:
    """Run ``script --rank ARGUMENTS`` under torchrun, one thread per rank, and wait for it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, script, "--rank", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
