"""Trainer ranks as child processes of this machine: started, watched and ended together."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_rl.errors import MegatronRLError, TrainingError
from megatron_rl.launch.failures import REPORT_FD, RankFailure, read_failure
from megatron_rl.util.child_process import ending_with_parent
from megatron_rl.util.exit_codes import HUNG, STOPPED
from megatron_rl.util.ports import free_port

log = logging.getLogger(__name__)

PREPARED = "MEGATRON_RL_PREPARED"
"""Environment variable of ranks whose configuration and run folder the parent process has already checked."""

SETTLE_SECONDS = 0.3
"""Wait between the first failure and the verdict: the exit of a killed rank may be seen after its peers' errors."""


class LocalRanks:
    """Ranks that run ``python -m MODULE ARGUMENTS``, each in its own session; none outlives this process.

    Args:
        command: the module and its arguments.
        count: number of ranks.
        grace_seconds: time to finish the step and write a checkpoint after a stop request.
    """

    def __init__(self, command: Sequence[str], count: int, grace_seconds: float = 60.0) -> None:
        self._stop_requested = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        self._failures: dict[int, RankFailure] = {}
        self._command, self._count, self._grace_seconds = command, count, grace_seconds

    def run(self) -> int:
        """Start all ranks, wait for them, and end all if one fails; return the exit code.

        Raises:
            MegatronRLError: the message of the first failing rank, or how it ended.
        """
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
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._pipes.append(read_end)
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),  # some tasks iterate over sets to make prompts
            PREPARED: "1",
            REPORT_FD: str(write_end),
        }
        command = ending_with_parent([sys.executable, "-m", *self._command])
        try:
            return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(write_end,))
        finally:
            os.close(write_end)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_requested:
            raise KeyboardInterrupt
        self._stop_requested = True
        log.info("stopping after this step; repeat to stop immediately")
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _watch(self) -> int:
        stop_by = None
        while True:
            codes = self._poll()
            if HUNG in codes:  # a rank has printed the report, and the others exit by themselves
                return HUNG
            if self._failures or any(code not in (None, 0, STOPPED) for code in codes):
                time.sleep(SETTLE_SECONDS)
                return self._verdict(self._poll())
            if all(code is not None for code in codes):
                return STOPPED if any(codes) else 0
            if self._stop_requested:
                stop_by = stop_by or time.monotonic() + self._grace_seconds
                if time.monotonic() > stop_by:
                    raise TrainingError(f"the ranks did not stop within {self._grace_seconds:.0f} s and were killed")
            time.sleep(0.1)

    def _poll(self) -> list[int | None]:
        """Read the failure reports; return the ranks' exit codes, None for running ranks."""
        for rank, pipe in enumerate(self._pipes):
            if rank not in self._failures and (failure := read_failure(pipe)):
                self._failures[rank] = failure
        return [child.poll() for child in self._children]

    def _verdict(self, codes: Sequence[int | None]) -> int:
        """Return STOPPED if a stop request ended ranks that were starting; otherwise raise the first failure."""
        if self._stop_requested and -signal.SIGTERM in codes:
            log.info("stopped while starting")
            return STOPPED
        for rank, code in enumerate(codes):
            if code is not None and code < 0:  # a killed rank makes the others fail
                hint = "; was there too little memory?" if code == -signal.SIGKILL else ""
                raise TrainingError(f"rank {rank} was ended by {signal.Signals(-code).name}{hint}")
        for failure in self._failures.values():
            if failure.expected:
                raise MegatronRLError(failure.text)
        for rank, failure in self._failures.items():
            sys.stderr.write(failure.text)
            raise TrainingError(f"rank {rank} failed, its traceback is above: {failure.last_line}")
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code not in (None, 0, STOPPED))
        raise TrainingError(f"rank {rank} ended with exit code {code}; its message is above")

    def _end_all(self) -> None:
        for rank, child in enumerate(self._children):
            if child.poll() is None:
                child.kill() if rank in self._failures else child.terminate()
        deadline = time.monotonic() + (0.1 if self._failures else 3.0)
        for child in self._children:
            try:
                child.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for pipe in self._pipes:
            os.close(pipe)
