"""Trainer ranks of this machine as child processes: started together, watched, ended together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_rl.errors import MegatronRLError, TrainingError
from megatron_rl.launch.failures import REPORTS, RankFailure, read_failure
from megatron_rl.util.child_process import ending_with_parent
from megatron_rl.util.exit_codes import HUNG, STOPPED
from megatron_rl.util.ports import free_port

PREPARED = "MEGATRON_RL_PREPARED"
"""Set for ranks whose configuration and run folder have been checked by the process that starts them."""

SETTLE_SECONDS = 0.3
"""Between the first sign of a failure and the verdict: a killed rank is seen a little after its neighbours' errors."""


class LocalRanks:
    """Ranks that run ``python -m megatron_rl WORDS``, each in a session of its own; none outlives this process.

    Args:
        words: the verb and its arguments.
        count: how many ranks.
        grace_seconds: how long they may take to finish their step and write a checkpoint after a stop was asked for.
    """

    def __init__(self, words: Sequence[str], count: int, grace_seconds: float = 60.0) -> None:
        self._asked_to_stop = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        self._failures: dict[int, RankFailure] = {}
        self._words, self._count, self._grace_seconds = words, count, grace_seconds

    def run(self) -> int:
        """Start all ranks, wait for them, and end all if one fails.

        Raises:
            MegatronRLError: what the first failing rank says, or how it ended.
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
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        self._pipes.append(ours)
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),  # some tasks make prompts by way of sets
            PREPARED: "1",
            REPORTS: str(theirs),
        }
        command = ending_with_parent([sys.executable, "-m", "megatron_rl", *self._words])
        try:
            return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(theirs,))
        finally:
            os.close(theirs)

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
            codes = self._look()
            if HUNG in codes:  # the report was printed by a rank, and the others end by themselves
                return HUNG
            if self._failures or any(code not in (None, 0, STOPPED) for code in codes):
                time.sleep(SETTLE_SECONDS)  # what broke first may not be seen first
                return self._end_of(self._look())
            if all(code is not None for code in codes):
                return STOPPED if any(codes) else 0
            if self._asked_to_stop:
                stop_by = stop_by or time.monotonic() + self._grace_seconds
                if time.monotonic() > stop_by:
                    raise TrainingError(f"the ranks did not stop within {self._grace_seconds:.0f} s and were killed")
            time.sleep(0.1)

    def _look(self) -> list[int | None]:
        """Return the ranks' exit codes, None for those that run; keep what they tell."""
        for rank, pipe in enumerate(self._pipes):
            if rank not in self._failures and (failure := read_failure(pipe)):
                self._failures[rank] = failure
        return [child.poll() for child in self._children]

    def _end_of(self, codes: Sequence[int | None]) -> int:
        """Return STOPPED if a stop came before the ranks were ready for one; else raise what went wrong first."""
        if self._asked_to_stop and -signal.SIGTERM in codes:
            sys.stderr.write("megatron-rl: stopped while starting\n")
            return STOPPED
        for rank, code in enumerate(codes):
            if code is not None and code < 0:  # whoever was killed is why the others failed
                why = "; was there too little memory?" if code == -signal.SIGKILL else ""
                raise TrainingError(f"rank {rank} was ended by {signal.Signals(-code).name}{why}")
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
