"""A training job as its user starts it: a process, watched by its files, and ended with everything it started."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.toml")
SMALL = (
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.updates_per_step=2",
    "rollout.sampling.max_new_tokens=24",
    "evaluate.every=0",
    "checkpoint.export=false",
    "entropy.target_fraction=1",  # numbers that the loss adapts: resumed like weights and samples
    "entropy.step=1e-3",
)
ONE_RANK = ("parallel.tensor=1", "parallel.expert=1")
PATIENCE_SECONDS = 180.0
"""Several times what anything here takes on two busy cores."""


def train(folder: Path, *settings: str, overlays: Sequence[str] = ()) -> list[str]:
    """Return the words of a small run; later settings replace the small ones."""
    last = dict(setting.split("=", 1) for setting in (*SMALL, *settings))
    return ["train", DEMO, *overlays, f"log.path={folder}", *(f"{key}={value}" for key, value in last.items())]


class Job:
    """``python -m megatron_rl train configs/demo.toml`` with few prompts, in a session of its own."""

    def __init__(
        self,
        folder: Path,
        *settings: str,
        command: Sequence[str] = ("-m", "megatron_rl"),
        overlays: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the job is the context manager)
        words = [sys.executable, *command, *train(folder, *settings, overlays=overlays)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = psutil.Popen(
            words, cwd=ROOT, env=environment, stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.seen: set[psutil.Process] = {psutil.Process(self.process.pid)}

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left():
            process.kill()
        self.process.wait()
        self.said.close()

    def look(self) -> list[psutil.Process]:
        """Return what the job runs now beneath its first process; all of it is remembered."""
        try:
            below = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen.update(below)
        return below

    def controller(self) -> psutil.Process:
        """Return the process that samples for the main rank."""
        (controller,) = [p for p in self.look() if "megatron_rl.rollout.controller_process" in p.cmdline()]
        return controller

    def ranks(self) -> list[psutil.Process]:
        """Return the trainer ranks, in order of rank."""
        return sorted(self.process.children(), key=lambda process: process.pid)

    def server(self) -> psutil.Process:
        """Return the rollout server that the controller started."""
        (server,) = [p for p in self.look() if "megatron_rl.inference_server.serve" in p.cmdline()]
        return server

    def servers(self) -> list[psutil.Process]:
        """Return the rollout servers that run."""
        alive = [p for p in self.look() if p.status() != psutil.STATUS_ZOMBIE]
        return [p for p in alive if "megatron_rl.inference_server.serve" in p.cmdline()]

    def left(self) -> list[psutil.Process]:
        """Return what still runs of everything ever seen."""
        self.look()
        return [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def until(self, what: Callable[[], object]) -> "Job":
        """Wait until something is so, while the job runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what():
            self.look()
            assert self.process.poll() is None, f"the job ended: {self.output()}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {self.output()}"
            time.sleep(0.02)
        return self

    def until_steps(self, count: int) -> "Job":
        """Wait until so many steps are in metrics.jsonl."""
        return self.until(lambda: len(self.metrics()) >= count)

    def end(self) -> int:
        """Wait for the end; return the exit code. Nothing that the job started may outlive it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, f"no end within {PATIENCE_SECONDS} s: {self.output()}"
            time.sleep(0.02)
        deadline = time.monotonic() + 10
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.left() == []
        return self.process.returncode

    def output(self) -> str:
        """Return what it has said so far on both streams."""
        self.said.seek(0)
        return self.said.read()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the whole lines of metrics.jsonl without the times."""
        return metrics_of(self.folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's metrics.jsonl without the times."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in whole]


def same_result(folder: Path, other: Path) -> None:
    """Assert that two runs have the same numbers, samples and weights, bit for bit."""
    assert metrics_of(folder) == metrics_of(other)
    assert (folder / "rollouts.jsonl").read_bytes() == (other / "rollouts.jsonl").read_bytes()
    assert (folder / "tokens.jsonl").read_bytes() == (other / "tokens.jsonl").read_bytes()
    newest, expected = (sorted((run / "checkpoints").glob("step_*"))[-1] for run in (folder, other))
    files = sorted(path.name for path in expected.glob("*.safetensors"))
    assert newest.name == expected.name
    assert len(files) > 0
    assert all((newest / name).read_bytes() == (expected / name).read_bytes() for name in files)
