"""The share of a demo step that is spent in collectives: python benchmarks/communication.py [--steps 12]

Runs the demo on one rank and on two (tensor 2, expert 2) with timers around the functions of torch.distributed, and
prints the phases of the main rank, each from its fastest step. A collective's time includes waiting for the other rank.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import run_on_ranks, table

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
"""The rollout phase is left out: there the other ranks wait for the main rank, which waits for the server."""


class Clock:
    """Counts seconds and calls of collectives since the last reading."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def timed(self, function: Callable[..., object], counts: int) -> Callable[..., object]:
        """Return the function with a timer around it; a collective inside another one counts once."""

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
        """Return seconds and calls, and reset both."""
        found = (self.seconds, self.calls)
        self.seconds, self.calls = 0.0, 0
        return found


def replace(owner: object, name: str, function: Callable[..., object]) -> None:
    """Replace an attribute; the package itself may not patch others, a benchmark may."""
    setattr(owner, name, function)


def rank(out: Path, words: list[str]) -> int:
    """Run one trainer rank with timed collectives; the main rank writes (phase, seconds, in collectives, calls)."""
    import torch.distributed as dist

    clock, lines = Clock(), list[tuple[str, float, float, int]]()
    for module in (dist, dist.distributed_c10d):
        for name in FUNCTIONS:
            replace(module, name, clock.timed(getattr(module, name), 1))
    replace(dist.Work, "wait", clock.timed(dist.Work.wait, 0))  # asynchronous collectives

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
    """Return (seconds, seconds in collectives, calls) per phase, each from the step in which it was fastest."""
    out = folder / "phases.json"
    run = ["train", "configs/demo.toml", f"train.steps={steps}", "evaluate.every=0", f"log.path={folder / 'run'}"]
    run_on_ranks(__file__, ranks, [str(out), *run, *settings])
    found: dict[str, list[list[float]]] = defaultdict(list)
    for name, *numbers in json.loads(out.read_text()):
        found[name].append(numbers)

    # The first two steps are warm-up. Other load on the machine slows some of the rest, hence the minimum.
    fastest = {name: min(lines[2:]) for name, lines in found.items() if name in PHASES}
    return {name: (seconds, inside, calls) for name, (seconds, inside, calls) in fastest.items()}


def main() -> int:
    """Measure both layouts and print the table; with ``--rank``, run one rank."""
    if sys.argv[1:2] == ["--rank"]:
        return rank(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    rows = []
    for name, (ranks, settings) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            for phase, (seconds, inside, calls) in measure(ranks, settings, steps, Path(folder)).items():
                rows.append([name, phase, f"{seconds:.3f}", f"{inside:.3f}", f"{inside / seconds:.0%}", f"{calls:.0f}"])
    print(table(["layout", "phase", "seconds", "in collectives", "share", "calls"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
