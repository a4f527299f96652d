"""One run, trainer and server each in a process forked from one that has imported everything.

The trainer is ``megatron-rl train`` as torchrun would start it: the same plan, folder, loop and journal. The server is
``megatron-rl serve``, reached over HTTP; the only difference to a run of its own is that nothing is imported again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from benchmarks.study.cells import Cell
from megatron_rl.observability.file_names import METRICS, NONFINITE
from megatron_rl.util.ports import free_port

CONFIGS = Path(__file__).parent
_HEALTH_SECONDS = 120.0
CPU_SECONDS = "cpu_seconds"
"""File in which the trainer leaves what it took."""


class RunFailed(Exception):
    """A run ended with an exit code other than 0.

    Attributes:
        diverged: because a loss or a gradient was no longer finite, which is a result; anything else is an accident.
    """

    def __init__(self, message: str, diverged: bool = False) -> None:
        super().__init__(message)
        self.diverged = diverged


def train_once(cell: Cell, model: Path, timeout_seconds: float) -> tuple[list[dict[str, object]], float]:
    """Run one cell; return the lines of its ``metrics.jsonl``, and the CPU seconds of trainer and server.

    Args:
        cell: what to run; with a lag, the server batches by row, as servers that a run starts itself.
        model: what is trained and served.
        timeout_seconds: the run is ended after so long.

    Raises:
        RunFailed: with the end of what the run wrote.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.study.preload"])
    with tempfile.TemporaryDirectory(prefix="megatron-rl-study-") as place:
        folder = Path(place) / "run"
        port = free_port()
        own = [
            str(CONFIGS / cell.config),
            *cell.words,
            f"log.path={folder}",
            f'rollout.urls=["http://127.0.0.1:{port}"]',
            f"model.path={model}",
        ]
        server = context.Process(
            target=_serve, args=(str(model), port, bool(cell.condition.lag), Path(place) / "server.log")
        )
        trainer = context.Process(target=_train, args=(own, free_port(), Path(place) / "train.log"))
        try:
            server.start()
            _wait_for(port)
            trainer.start()
            trainer.join(timeout_seconds)
            seconds = sum(psutil.Process(server.pid).cpu_times()[:2])
        finally:
            for process in (trainer, server):
                if process.pid is not None:
                    process.kill()
                    process.join()
        metrics = folder / METRICS
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        if trainer.exitcode:
            log = (Path(place) / "train.log").read_text(errors="replace")
            diverged = (folder / NONFINITE).exists() or "norm of the gradients is" in log
            raise RunFailed(f"exit code {trainer.exitcode} after {len(lines)} steps: {log[-1500:]}", diverged)
        return lines, seconds + float((Path(place) / CPU_SECONDS).read_text())


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _HEALTH_SECONDS
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5.0):
                return
        except (URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise RunFailed(f"the server on port {port} did not answer") from None
            time.sleep(0.02)


def end_with_the_queue() -> None:
    """End this process when the one that asked for it ends, even if that one is killed."""
    queue = multiprocessing.parent_process()
    assert queue is not None, "this is a child process"

    def watch() -> None:
        wait([queue.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(log: Path) -> None:
    """Write what this process prints to a file, and end when the queue ends, however that happens."""
    end_with_the_queue()
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)


def _serve(model: str, port: int, continuous: bool, log: Path) -> None:
    _begin(log)
    from megatron_rl.inference_server.serve import add_arguments, serve

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    batching = "continuous" if continuous else "request"
    sys.exit(serve(parser.parse_args([model, f"--port={port}", "--weight-version=0", f"--batching={batching}"])))


def _train(words: Sequence[str], port: int, log: Path) -> None:
    _begin(log)
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from megatron_rl.cli import main

    code = main(["train", *words])
    log.with_name(CPU_SECONDS).write_text(f"{time.process_time():.2f}")
    sys.exit(code)
