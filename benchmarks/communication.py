"""What share of a demo step is spent in collectives: python benchmarks/communication.py [--steps 12]

Runs the demo on one rank and on two (tensor 2, expert 2) with every function of torch.distributed timed, and prints a
table of the main rank's phases, each in its fastest step. The time of a collective includes waiting for the other rank.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "one rank": (1, ["parallel.tensor=1", "parallel.expert=1"]),
    "tensor=2 expert=2": (2, ["parallel.tensor=2", "parallel.expert=2"]),
}
FUNCTIONS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all_single",
    "broadcast",
    "barrier",
    "send",
    "recv",
)
PHASES = ("score", "train", "weights")
"""Not rollout: there the other ranks wait for the main rank, which waits for the server."""


class Clock:
    """Seconds and calls of collectives since it was last read."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def timed(self, function: Callable[..., object], counts: int) -> Callable[..., object]:
        """Return the function with its time added; a collective inside another counts once."""

        def run(*args: object, **options: object) -> object:
            began = time.perf_counter()
            self._depth += 1
            try:
                return function(*args, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began
                    self.calls += counts

        return run

    def read(self) -> tuple[float, int]:
        """Return seconds and calls, and start again."""
        found = (self.seconds, self.calls)
        self.seconds, self.calls = 0.0, 0
        return found


def replace(owner: object, name: str, function: Callable[..., object]) -> None:
    """Put a function in the place of another: a benchmark may look where the package must not."""
    setattr(owner, name, function)


def rank(out: Path, words: list[str]) -> int:
    """Be a trainer rank whose collectives are timed; the main rank writes (phase, seconds, in collectives, calls)."""
    import torch.distributed as dist

    clock, lines = Clock(), list[tuple[str, float, float, int]]()
    for module in (dist, dist.distributed_c10d):
        for name in FUNCTIONS:
            replace(module, name, clock.timed(getattr(module, name), 1))
    replace(dist.Work, "wait", clock.timed(dist.Work.wait, 0))  # what was started without waiting

    from megatron_rl.cli import main
    from megatron_rl.observability.recorder import RunRecorder

    original = RunRecorder.phase

    @contextmanager
    def phase(self: RunRecorder, name: str) -> Iterator[None]:
        clock.read()
        began = time.perf_counter()
        with original(self, name):
            yield
        lines.append((name, time.perf_counter() - began, *clock.read()))

    replace(RunRecorder, "phase", phase)
    code = main(words)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(lines))
    return code


def measure(ranks: int, settings: list[str], steps: int, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Return (seconds, seconds in collectives, calls) of each phase: of the step where it was fastest."""
    out = folder / "phases.json"
    run = ["train", "configs/demo.toml", f"train.steps={steps}", "evaluate.every=0", f"log.path={folder / 'run'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command = [*launcher, str(Path(__file__)), "--rank", str(out), *run, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[list[float]]] = defaultdict(list)
    for name, *numbers in json.loads(out.read_text()):
        found[name].append(numbers)

    # The first two steps warm up; what else runs on the machine slows the others more or less.
    fastest = {name: min(lines[2:]) for name, lines in found.items() if name in PHASES}
    return {name: (seconds, inside, calls) for name, (seconds, inside, calls) in fastest.items()}


def main() -> int:
    """Measure both layouts and print the table, or be a rank."""
    if sys.argv[1:2] == ["--rank"]:
        return rank(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    print("| layout | phase | seconds | in collectives | share | calls |\n|---|---|---|---|---|---|")
    for name, (ranks, settings) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            for phase, (seconds, inside, calls) in measure(ranks, settings, steps, Path(folder)).items():
                print(f"| {name} | {phase} | {seconds:.3f} | {inside:.3f} | {inside / seconds:.0%} | {calls:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
