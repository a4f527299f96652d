"""``megatron-rl train`` on one machine: starts the trainer ranks, watches them, and leaves no process behind.

Where torchrun or srun have started this process as a rank, it is that rank.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from types import FrameType

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.errors import TrainingError
from megatron_rl.launch.plan import make_plan
from megatron_rl.parallel.mesh import launched_rank
from megatron_rl.train.folder import prepare_folder

STOPPED = 130
"""Exit code of a run that was asked to stop and can be resumed."""

GRACE_SECONDS = 60.0
"""How long ranks may take to finish their step and write a checkpoint after a stop was asked for."""


def main(loaded: Loaded[Run], words: Sequence[str]) -> int:
    """Train; return the exit code: 0 when done, 130 when stopped and resumable, else the first failing rank's."""
    launched = launched_rank()
    if launched is not None:
        quiet_upstream()
        from megatron_rl.train.rank import run_rank

        return run_rank(loaded)
    plan = make_plan(loaded)
    for change in prepare_folder(loaded.run):
        sys.stderr.write(f"megatron-rl train: resumed with another setting: {change}\n")
    return LocalRanks(words, plan.layout.ranks).run()


def quiet_upstream() -> None:
    """Silence what torch and megatron-core warn about themselves; call before either is imported."""
    for message in UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


UPSTREAM_WARNINGS = (
    r"Apex is not installed",
    r"Transformer Engine and Apex are not installed",
    r".*`torch\.distributed\.\w+` is deprecated",  # megatron-core's calls
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core's optimizer looks at every main parameter
    r"index_reduce\(\) is in beta",
    r"When using sequence parallelism it is recommended",  # a CUDA setting
    r"full scope is deprecated",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # its experts
    r".*recommended.*CUDA_DEVICE_MAX_CONNECTIONS",
)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LocalRanks:
    """The trainer ranks of one machine as child processes, each in a session of its own."""

    def __init__(self, words: Sequence[str], count: int) -> None:
        self._asked_to_stop = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._words, self._count = words, count

    def run(self) -> int:
        """Start all ranks, wait for them, and end all if one fails."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        port = free_port()
        try:
            for rank in range(self._count):
                self._children.append(self._start(rank, port))
            return self._watch()
        finally:
            self._end_all()

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self._count))
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
            "MEGATRON_RL_PARENT": str(os.getpid()),
        }
        command = [sys.executable, "-m", "megatron_rl", "train", *self._words]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        sys.stderr.write("megatron-rl train: stopping after this step; once more stops at once\n")
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _watch(self) -> int:
        stop_by = None
        while True:
            codes = [child.poll() for child in self._children]
            fine = (0, STOPPED, -signal.SIGTERM) if self._asked_to_stop else (0, STOPPED)
            failed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code not in fine]
            if failed:
                rank, code = failed[0]
                if code == 2:
                    return 2
                raise TrainingError(f"trainer rank {rank} ended with {_worded(code)}; its message is above")
            if all(code is not None for code in codes):
                return STOPPED if any(codes) else 0
            if self._asked_to_stop:
                stop_by = stop_by or time.monotonic() + GRACE_SECONDS
                if time.monotonic() > stop_by:
                    raise TrainingError(f"the ranks did not stop within {GRACE_SECONDS:.0f} s and were killed")
            time.sleep(0.1)

    def _end_all(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + 3.0
        for child in self._children:
            try:
                child.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _worded(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
