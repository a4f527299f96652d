"""Verification of groups of responses: in processes with a time limit, or inline if no verifier can hang.

If a verifier raises, hangs, or returns something other than a finite number, its response is unverified; the run goes
on.
"""

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.tasks import wire
from megatron_rl.tasks.base import Verdict, unverified

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""How often a job is asked again after the processes ended; a job that ends them each time stays unverified."""

Verdicts = tuple[Verdict, ...]


def worker_setup(run: Run) -> Mapping[str, object]:
    """Return the first message to ``tasks.worker``: what it needs of the configuration."""
    return {
        "task": run.task.model_dump(mode="json"),
        "reward": run.reward.model_dump(mode="json"),
        "max_new_tokens": run.rollout.sampling.max_new_tokens,
    }


class Verifier(Protocol):
    """Verifies groups of responses."""

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """Return a future of the verdicts, one tuple per group; may be called from any thread."""
        ...

    def close(self) -> None:
        """End the verifying processes, if there are any."""
        ...


class InlineVerifier:
    """Verifies in the calling thread."""

    def __init__(self, verify: Callable[[Prompt, Response], Verdict]) -> None:
        self.verify = verify

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """Return a completed future of the verdicts."""
        done: Future[list[Verdicts]] = Future()
        settle(done, lambda: [tuple(self.verify(group.prompt, r) for r in group.responses) for group in groups])
        return done

    def close(self) -> None:
        """Do nothing: there are no processes."""


@dataclass
class PendingJob:
    """A job without a verdict yet."""

    line: bytes
    verdict: Future[Verdict]
    restarts: int = 0
    """How often the processes ended before they answered this job."""


class VerifierPool:
    """Verifies in the processes of ``tasks.worker``. If they end, they are restarted and get the open jobs again."""

    def __init__(self, run: Run) -> None:
        self._setup = worker_setup(run)
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._numbers = count()
        self._pending: dict[int, PendingJob] = {}
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._start()

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """Send the jobs to the processes and return a future of the verdicts."""
        futures = [[self._submit_job(group.prompt, response) for response in group.responses] for group in groups]
        return gather(futures)

    def _submit_job(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        with self._writing:
            with self._state:
                if self._process is None:
                    self._start()
                number = next(self._numbers)
                job = self._pending[number] = PendingJob(wire.encode_job(number, prompt, response), future)
            self._write([job.line])
        return future

    def _write(self, lines: Iterable[bytes]) -> None:
        """Send lines to the processes; the caller holds ``_writing``.

        The caller does not hold ``_state``: the reader thread needs it to read verdicts, without which
        the processes block.
        """
        assert self._process is not None, "was started"
        assert self._process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(BrokenPipeError):  # the reader thread starts new processes
            for line in lines:
                self._process.stdin.write(line)
            self._process.stdin.flush()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.tasks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard must reach the trainer only
        )
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write(wire.encode_line(self._setup))
        self._thread = threading.Thread(target=self._read, args=(self._process,), name="verdicts", daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None, "opened as a pipe"
        for line in process.stdout:
            message = json.loads(line)
            with self._state:
                job = self._pending.pop(message["job"])
            job.verdict.set_result(Verdict(**message["verdict"]))
        with self._writing:
            process.wait()
            with self._state:
                lost = self._take_lost_jobs()
                self._process = None
                if self._pending:
                    self._start()
            if self._pending:
                logger.warning("the verifying processes ended; they were started again for %d jobs", len(self._pending))
                self._write([job.line for job in list(self._pending.values())])
        for job in lost:
            job.verdict.set_result(unverified("raised", f"the verifying processes ended {job.restarts} times"))

    def _take_lost_jobs(self) -> list[PendingJob]:
        """Count a restart of each open job, and remove and return those that are not asked again."""
        for job in self._pending.values():
            job.restarts += 1
        numbers = [n for n, job in self._pending.items() if self._closed or job.restarts > MAX_RESTARTS]
        return [self._pending.pop(number) for number in numbers]

    def close(self) -> None:
        """End the processes and wait for them."""
        with self._writing:
            self._closed = True
            process, thread = self._process, self._thread
            if process is not None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        if thread is not None:
            thread.join()


def settle(future: Future[T], make: Callable[[], T]) -> None:
    """Complete a future with the result of a call, or with the exception that it raises."""
    try:
        future.set_result(make())
    finally:
        if not future.done():
            future.set_exception(sys.exc_info()[1])


def gather(groups: Sequence[Sequence[Future[Verdict]]]) -> Future[list[Verdicts]]:
    """Return a future of all verdicts, completed with the last of them."""
    futures = [future for group in groups for future in group]
    done: Future[list[Verdicts]] = Future()
    left, lock = len(futures), threading.Lock()

    def count_down(_: Future[Verdict]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            settle(done, lambda: [tuple(future.result() for future in group) for group in groups])

    if not futures:
        done.set_result([() for _ in groups])
    for future in futures:
        future.add_done_callback(count_down)
    return done
