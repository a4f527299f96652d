"""trl's GRPOTrainer and this package on the same work: tokens per second, time by phase, CPU time, memory, accuracy.

    tools/peer-env FOLDER                         # an environment with trl and verl
    python benchmarks/peers.py --peers FOLDER     # writes docs/peers.json and the tables of docs/peers.md

Both train the demo's model on the same prompts with the same settings, in turns (A B A B), each as one job whose
processes are bound to the same cores. Both are measured from outside: wall time and CPU time of all processes of the
job between two of its metrics lines, and the peak memory of each process.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT

SETTINGS: dict[str, Any] = {
    "prompts_per_step": 32,
    "group_size": 8,
    "updates_per_step": 4,
    "max_new_tokens": 40,
    "lr": 2e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "clip_grad": 1.0,
}
WARM_UP = 2
"""Rollout batches at the start that do not count: imports and first calls."""
PHASES = ("generate", "rollout", "score", "train", "weights", "total")
"""trl's "generate" corresponds to our "rollout", which includes the rewards."""


@dataclass(frozen=True)
class Setup:
    """The cores that both jobs get, and the processes and threads that each uses."""

    name: str
    cores: int
    ranks: int
    servers: int
    """Our servers have one thread each, like our ranks: a second thread does not speed up models of this size."""
    peer_threads: int


SETUPS = (
    Setup("1 core", 1, 1, 1, 1),
    Setup("2 cores, 1 rank", 2, 1, 2, 2),
    Setup("2 cores, 2 ranks", 2, 2, 2, 1),
)


@dataclass
class Measured:
    """One job: its metrics lines, and the time and memory of its processes after the warm-up."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """Peak resident memory per process; shared pages count in every process."""

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The metrics lines after the warm-up."""
        return self.lines[WARM_UP:]

    def numbers(self) -> dict[str, Any]:
        """Return the job's entry in docs/peers.json."""
        tokens, batches = sum(line["tokens"] for line in self.timed), len(self.timed)
        seconds = {phase: [line["seconds"].get(phase, 0.0) for line in self.timed] for phase in PHASES}
        seconds["generate"] = [max(pair) for pair in zip(seconds["generate"], seconds.pop("rollout"), strict=True)]
        return {
            "tokens_per_second": tokens / self.wall_seconds,
            "tokens_per_cpu_second": tokens / self.cpu_seconds,
            "tokens": tokens,
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "seconds_per_batch": {phase: sum(values) / batches for phase, values in seconds.items()},
            "peak_bytes": sorted(self.peak_bytes.values(), reverse=True),
            "rewards": [round(line["reward_mean"], 4) for line in self.lines],
            "tokens_by_batch": [int(line["tokens"]) for line in self.lines],
        }


def prompts_of(seed: int, count: int) -> list[tuple[str, str]]:
    """Return the first training prompts of our run and their answers."""
    from transformers import AutoTokenizer

    from megatron_rl.config.schema import ChainedArithmeticTask
    from megatron_rl.data.prompts import first_prompts
    from megatron_rl.tasks.chained_arithmetic import ChainedArithmetic

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "demo-model")
    task = ChainedArithmetic(ChainedArithmeticTask(), tokenizer)
    return [(prompt.text, prompt.answer) for prompt in first_prompts(task.prompts("train", seed), count)]


def our_command(setup: Setup, seed: int, steps: int, folder: Path) -> list[str]:
    s = SETTINGS
    settings = {
        "model.path": ROOT / "configs" / "demo-model",
        "parallel.tensor": 1,
        "parallel.expert": 1,
        "parallel.ranks": setup.ranks,
        "rollout.servers": setup.servers,
        "rollout.sampling.max_new_tokens": s["max_new_tokens"],
        "objective.name": "grpo",
        **{f"optimizer.{name}": s[name] for name in ("lr", "beta1", "beta2", "epsilon", "clip_grad")},
        **{f"train.{name}": s[name] for name in ("prompts_per_step", "group_size", "updates_per_step")},
        "train.steps": steps,
        "train.seed": seed,
        "evaluate.every": 0,
        "log.path": folder,
        "log.rollouts": "false",
        "checkpoint.export": "false",
    }
    if setup.servers > 1:
        settings["rollout.sequences_per_server"] = s["prompts_per_step"] * s["group_size"] // setup.servers
    words = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "megatron_rl", "train", "configs/demo.toml", *words]


def trl_command(setup: Setup, seed: int, steps: int, folder: Path, peers: Path) -> list[str]:
    job = {
        "model": str(ROOT / "configs" / "demo-model"),
        "folder": str(folder / "trl"),
        "metrics": str(folder / "metrics.jsonl"),
        "processes": setup.ranks,
        "prompts": prompts_of(seed, steps * SETTINGS["prompts_per_step"]),
        "settings": {**SETTINGS, "seed": seed, "steps": steps},
    }
    (folder / "job.json").write_text(json.dumps(job))
    python = [str(peers / "bin" / "python")]
    if setup.ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setup.ranks}"]
    return [*python, "benchmarks/trl_job.py", str(folder / "job.json")]


def measure(command: Sequence[str], threads: int, setup: Setup, folder: Path, steps: int) -> Measured:
    """Run a job on the setup's cores and measure it from outside."""
    cores = sorted(os.sched_getaffinity(0))[: setup.cores]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    measured = Measured()
    marks: dict[int, tuple[float, float]] = {}
    began = time.monotonic()
    with (folder / "output").open("w") as output:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        root = psutil.Process(job.pid)
        while job.poll() is None:
            done = _lines(folder / "metrics.jsonl")
            if done in (WARM_UP, steps) and done not in marks:
                marks[done] = time.monotonic(), _measure_processes(root, measured)
            time.sleep(0.02)
    if job.returncode or set(marks) != {WARM_UP, steps}:
        sys.exit(f"{folder}: exit code {job.returncode} after {time.monotonic() - began:.0f} s; see {folder}/output")
    (first, first_cpu), (last, last_cpu) = marks[WARM_UP], marks[steps]
    measured.wall_seconds, measured.cpu_seconds = last - first, last_cpu - first_cpu
    measured.lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return measured


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _measure_processes(root: psutil.Process, measured: Measured) -> float:
    """Return the CPU seconds of the job's processes so far, and record the peak memory of each."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times, status = process.cpu_times(), Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
        total += times.user + times.system
        peak = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
        if peak:
            measured.peak_bytes[process.pid] = peak[0]
    return total


SIDES = ("ours", "trl")


def run(side: str, setup: Setup, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one job and return its numbers."""
    folder = options.runs / f"{side}-{setup.name.replace(' ', '-').replace(',', '')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if side == "ours":
        command, threads = our_command(setup, seed, options.steps, folder), 1
    else:
        command, threads = trl_command(setup, seed, options.steps, folder, options.peers), setup.peer_threads
    numbers = measure(command, threads, setup, folder, options.steps).numbers()
    print(
        f"{side:5} {setup.name:16} seed {seed}: {numbers['tokens_per_second']:7,.0f} tokens/s, "
        f"{numbers['tokens_per_cpu_second']:7,.0f} per CPU second",
        flush=True,
    )
    return numbers


def middle(jobs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(job[key] for job in jobs)


def spread(jobs: Sequence[dict[str, Any]], key: str) -> str:
    """Return the median and the range, as text."""
    values = [job[key] for job in jobs]
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def speed_table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    lines = [
        "| cores | trainer | tokens/s | tokens per CPU second | generate | score | train | weights | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sides in results.items():
        for side, jobs in sides.items():
            phases = [
                statistics.median(job["seconds_per_batch"][phase] for job in jobs)
                for phase in ("generate", "score", "train", "weights")
            ]
            memory = max(jobs, key=lambda job: sum(job["peak_bytes"]))["peak_bytes"]
            cells = [f"{seconds:.3f}" if seconds else "-" for seconds in phases]
            sizes = [f"{size / 1e6:.0f}" for size in memory]
            parts = f" = {' + '.join(sizes)}" if len(sizes) > 1 else ""
            speeds = [spread(jobs, key) for key in ("tokens_per_second", "tokens_per_cpu_second")]
            cells = [name, side, *speeds, *cells, f"{sum(memory) / 1e6:,.0f}{parts}"]
            lines.append(f"| {' | '.join(cells)} |")
        keys = ("tokens_per_second", "tokens_per_cpu_second")
        ratios = [middle(sides["ours"], key) / middle(sides["trl"], key) for key in keys]
        lines.append(f"| {name} | **ours / trl** | **{ratios[0]:.2f}** | **{ratios[1]:.2f}** |" + " |" * 5)
    return lines


def accuracy_table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Return a table of the mean reward per five rollout batches, over all seeds of the first setup."""
    sides = next(iter(results.values()))
    steps = len(sides["ours"][0]["rewards"])
    blocks = [range(first, first + 5) for first in range(0, steps - 4, 5)]
    head = [f"{block[0] + 1}-{block[-1] + 1}" for block in blocks]
    lines = ["| rollout batches | " + " | ".join(head) + " |", "|---" * (len(blocks) + 1) + "|"]
    for side, jobs in sides.items():
        rewards = [f"{statistics.mean(job['rewards'][i] for job in jobs for i in block):.3f}" for block in blocks]
        ends = [statistics.mean(sum(job["tokens_by_batch"][: block[-1] + 1]) for job in jobs) for block in blocks]
        lines.append(f"| {side}: accuracy | " + " | ".join(rewards) + " |")
        lines.append(f"| {side}: tokens so far | " + " | ".join(f"{tokens:,.0f}" for tokens in ends) + " |")
    return lines


def write(options: argparse.Namespace, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write OUT.json and replace the tables between the markers of OUT.md."""
    conditions = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "settings": SETTINGS,
        "steps": options.steps,
        "seeds": options.seeds,
        "warm_up": WARM_UP,
        "setups": [asdict(setup) for setup in SETUPS],
        "load_average": list(os.getloadavg()),
    }
    out = options.out.with_suffix(".json")
    out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    page = options.out.with_suffix(".md")
    before, _, rest = (page.read_text() if page.exists() else "").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    made = (
        f"{options.seeds} runs of {options.steps} rollout batches each, {conditions['machine']}, {conditions['date']}."
    )
    tables = "\n".join([*speed_table(results), "", made, "", *accuracy_table(results)])
    page.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}")
    print(tables)


MARKS = ("<!-- tables: made by benchmarks/peers.py -->", "<!-- end of tables -->")


def main() -> None:
    """Run all jobs in turns and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder made by tools/peer-env")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--setups", default="", help="parts of setup names, comma-separated (default: all)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "peers")
    options = parser.parse_args()
    options.peers = options.peers.absolute()
    options.runs = options.runs.absolute()
    parts = [part.strip() for part in options.setups.split(",")]
    cores = len(os.sched_getaffinity(0))
    setups = [s for s in SETUPS if s.cores <= cores and any(part in s.name for part in parts)]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {s.name: {side: [] for side in SIDES} for s in setups}
    for seed in range(options.seeds):
        for setup in setups:
            for side in SIDES:
                results[setup.name][side].append(run(side, setup, seed, options))
    write(options, results)


if __name__ == "__main__":
    main()
