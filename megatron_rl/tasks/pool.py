"""Verdicts for groups, beside sampling and training: in processes with a time limit, or at once where nothing can hang.

A verifier that raises, hangs, or returns what is no finite number costs its response the reward, never the run.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Protocol, TypeVar

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.tasks import wire
from megatron_rl.tasks.base import Verdict, unverified
from megatron_rl.tasks.reward import RewardFunction, runs_inline

T = TypeVar("T")
Verdicts = tuple[Verdict, ...]


class Verifier(Protocol):
    """Gives verdicts."""

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """Ask and do not wait; from any thread."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def open_verifier(run: Run) -> Verifier:
    """Return who judges the responses of a run; close it."""
    if runs_inline(run.task, run.reward):
        return InlineVerifier(RewardFunction(run.task, run.reward, run.rollout.sampling.max_new_tokens).verify)
    return VerifierPool(run)


class InlineVerifier:
    """Judges in the thread that asks."""

    def __init__(self, verify: Callable[[Prompt, Response], Verdict]) -> None:
        self.verify = verify

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """See ``Verifier``."""
        done: Future[list[Verdicts]] = Future()
        settle(done, lambda: [tuple(self.verify(group.prompt, r) for r in group.responses) for group in groups])
        return done

    def close(self) -> None:
        """See ``Verifier``."""


class VerifierPool:
    """Processes that judge; see ``worker``. If they end they are started again with the next question."""

    def __init__(self, run: Run) -> None:
        self._setup = {
            "task": run.task.model_dump(mode="json"),
            "reward": run.reward.model_dump(mode="json"),
            "max_new_tokens": run.rollout.sampling.max_new_tokens,
        }
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._numbers = count()
        self._open: dict[int, Future[Verdict]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._start()

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """See ``Verifier``."""
        asked = [[self._ask(group.prompt, response) for response in group.responses] for group in groups]
        return gather(asked)

    def _ask(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        answer: Future[Verdict] = Future()
        with self._writing:
            with self._state:
                if self._process is None:
                    self._start()
                process, number = self._process, next(self._numbers)
                assert process is not None, "just started"
                assert process.stdin is not None, "a pipe was asked for"
                self._open[number] = answer
            # Not while holding the state: the reader needs it, and they read on only as long as it reads.
            with contextlib.suppress(BrokenPipeError):  # the reader settles what is open
                process.stdin.write(wire.job(number, prompt, response))
                process.stdin.flush()
        return answer

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.tasks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is the run's business
        )
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(wire.line(self._setup))
        self._thread = threading.Thread(target=self._read, args=(self._process,), name="verdicts", daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None, "a pipe was asked for"
        for said in process.stdout:
            answer = json.loads(said)
            with self._state:
                future = self._open.pop(answer["job"])
            future.set_result(Verdict(**answer["verdict"]))
        with self._state:
            lost = dict(self._open)
            self._open.clear()
            self._process = None
            process.wait()
        for future in lost.values():
            future.set_result(unverified("raised", "the verifying processes ended; they are started again"))

    def close(self) -> None:
        """See ``Verifier``."""
        with self._writing:
            process, thread = self._process, self._thread
            if process is not None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        if thread is not None:
            thread.join()


def settle(future: Future[T], make: Callable[[], T]) -> None:
    """Give a future what a call returns, or raises."""
    try:
        future.set_result(make())
    finally:
        if not future.done():
            future.set_exception(sys.exc_info()[1])


def gather(asked: Sequence[Sequence[Future[Verdict]]]) -> Future[list[Verdicts]]:
    """Return all verdicts once the last one is there."""
    every = [future for group in asked for future in group]
    done: Future[list[Verdicts]] = Future()
    left, lock = len(every), threading.Lock()

    def one_more(_: Future[Verdict]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            settle(done, lambda: [tuple(future.result() for future in group) for group in asked])

    if not every:
        done.set_result([() for _ in asked])
    for future in every:
        future.add_done_callback(one_more)
    return done
