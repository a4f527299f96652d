"""Trainer ranks of this machine as child processes: started together, watched, ended together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_rl.errors import TrainingError
from megatron_rl.rollout.process import guarded

STOPPED = 130
"""Exit code of a run that was asked to stop and can be resumed."""

PREPARED = "MEGATRON_RL_PREPARED"
"""Set for ranks whose configuration and run folder have been checked by the process that starts them."""

GRACE_SECONDS = 60.0
"""How long ranks may take to finish their step and write a checkpoint after a stop was asked for."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LocalRanks:
    """Ranks that run ``python -m megatron_rl WORDS``, each in a session of its own; none outlives this process."""

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
            PREPARED: "1",
        }
        command = [sys.executable, "-m", "megatron_rl", *self._words]
        return subprocess.Popen(guarded(command), env=environment, start_new_session=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        sys.stderr.write("megatron-rl: stopping after this step; once more stops at once\n")
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
                raise TrainingError(f"rank {rank} ended with {_worded(code)}; its message is above")
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
