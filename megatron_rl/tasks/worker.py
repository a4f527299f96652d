"""``python -m megatron_rl.tasks.worker``: verifies the jobs on stdin, in worker processes that may hang or crash.

    trainer --jobs--> this process --one job each--> forked workers: a verifier that raises ends its worker,
            <-verdicts--           <--verdict--      one that takes too long is killed; a new worker is forked

This process runs no verifier itself, so it always answers. It ends at the end of stdin, and its workers with it.
"""

import contextlib
import json
import logging
import os
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from megatron_rl.config.tasks import AnyTask, Reward
from megatron_rl.tasks import wire
from megatron_rl.tasks.base import Verdict, unverified
from megatron_rl.tasks.reward import RewardFunction
from megatron_rl.util.child_process import end_with_parent, hide_memory

DATA_BYTES = 4 << 30
"""Memory limit of a worker; a verifier that needs more gets a MemoryError."""

_CHUNK = 1 << 16


@dataclass
class Worker:
    """A forked process and its current jobs."""

    pid: int
    jobs_fd: int
    """Pipe to the worker, for jobs."""
    verdicts_fd: int
    """Pipe from the worker, for verdicts."""
    work: list[tuple[int, bytes]] = field(default_factory=list)
    """Number and line of each current job: one to verify, or many for which servers are asked."""
    deadline: float = 0.0
    received: bytearray = field(default_factory=bytearray)


class WorkerPool:
    """Assigns jobs to workers, and replaces workers that hang or end."""

    def __init__(self, reward_fn: RewardFunction, workers: int, seconds: float) -> None:
        self.reward_fn, self.seconds = reward_fn, seconds
        self.queue: deque[tuple[int, bytes]] = deque()
        self.batch_queue: deque[tuple[int, bytes]] = deque()
        """Jobs for which servers are asked first, many jobs per request; empty if there are no such servers."""
        self.workers = [self._fork() for _ in range(workers)]

    def run(self) -> None:
        """Answer jobs until the end of stdin."""
        received = bytearray()
        while True:
            self._assign()
            descriptors = [0, *(worker.verdicts_fd for worker in self.workers)]
            ready = select.select(descriptors, [], [], self._seconds_to_deadline())[0]
            if 0 in ready:
                chunk = os.read(0, _CHUNK)
                if not chunk:
                    return
                received += chunk
                *lines, received = received.split(b"\n")
                jobs = [(json.loads(line)["job"], bytes(line) + b"\n") for line in lines]
                (self.batch_queue if self.reward_fn.batch_servers else self.queue).extend(jobs)
            for index, worker in enumerate(self.workers):
                if worker.verdicts_fd in ready:
                    self._receive(index)
                elif worker.work and time.monotonic() >= worker.deadline:
                    reason = f"took longer than {self.seconds:g} s (reward.seconds)"
                    self._answer(worker, unverified("timed_out", reason))
                    self._replace(index)

    def _assign(self) -> None:
        for worker in self.workers:
            if worker.work or not (self.queue or self.batch_queue):
                continue
            if self.queue:
                worker.work = [self.queue.popleft()]
                line = worker.work[0][1]
            else:
                count = min(self.reward_fn.reward.http_batch, len(self.batch_queue))
                worker.work = [self.batch_queue.popleft() for _ in range(count)]
                line = wire.encode_batch([job for _, job in worker.work])
            worker.deadline = time.monotonic() + self.seconds
            _write(worker.jobs_fd, line)

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [worker.deadline for worker in self.workers if worker.work]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _receive(self, index: int) -> None:
        worker = self.workers[index]
        chunk = os.read(worker.verdicts_fd, _CHUNK)
        worker.received += chunk
        if worker.received.endswith(b"\n"):
            message = json.loads(worker.received)
            worker.received.clear()
            if "batch_verdicts" in message:
                answered = zip(worker.work, message["batch_verdicts"], strict=True)
                self.queue += [(number, wire.add_known_verdicts(job, known)) for (number, job), known in answered]
                worker.work = []
                return
            self._answer(worker, Verdict(**message["verdict"]))
            if message["last"]:
                self._replace(index)
        elif not chunk:
            reason = "its process died (out of memory, or a crash of the interpreter)"
            self._answer(worker, unverified("raised", reason))
            self._replace(index)

    def _answer(self, worker: Worker, verdict: Verdict) -> None:
        for number, _ in worker.work:
            _write(1, wire.encode_line({"job": number, "verdict": asdict(verdict)}))
        worker.work = []

    def _replace(self, index: int) -> None:
        worker = self.workers[index]
        os.killpg(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        os.close(worker.jobs_fd)
        os.close(worker.verdicts_fd)
        self.workers[index] = self._fork()

    def _fork(self) -> Worker:
        """Return a new worker. In the forked process this method never returns."""
        jobs_read, jobs_write = os.pipe()
        verdicts_read, verdicts_write = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.close(jobs_read)
            os.close(verdicts_write)
            os.setpgid(pid, pid)
            return Worker(pid, jobs_write, verdicts_read)
        _run_worker(self.reward_fn, parent, jobs_read, verdicts_write)
        raise AssertionError(f"worker {os.getpid()} returned")


def _run_worker(reward_fn: RewardFunction, parent: int, jobs_fd: int, verdicts_fd: int) -> None:
    """Verify jobs, report an exception as a verdict, and end this process without returning to the pool's code."""
    try:
        _verify_jobs(reward_fn, parent, jobs_fd, verdicts_fd)
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            failure = "timed_out" if isinstance(error, TimeoutError) else "raised"
            verdict = unverified(failure, f"{type(error).__name__}: {error}"[:500])
            _write(verdicts_fd, wire.encode_verdict(verdict, last=True))
        os._exit(0 if error is None else 1)


def _verify_jobs(reward_fn: RewardFunction, parent: int, jobs_fd: int, verdicts_fd: int) -> None:
    """Verify one job after another until the pipe is closed."""
    os.setpgid(0, 0)
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # output of a verifier must not mix with the verdicts
    with os.fdopen(jobs_fd, "rb") as lines:
        while os.getppid() == parent and (line := lines.readline()):
            message = json.loads(line)
            if "jobs" in message:
                verdicts = reward_fn.verify_batch([wire.decode_job(job) for job in message["jobs"]])
                _write(verdicts_fd, wire.encode_batch_verdicts(verdicts))
            else:
                verdict = reward_fn.verify(*wire.decode_job(message), wire.decode_known_verdicts(message))
                _write(verdicts_fd, wire.encode_verdict(verdict))


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def main() -> None:
    """Read the configuration from the first line of stdin, then answer jobs."""
    hide_memory()  # it holds the expected outputs of programs; forked workers inherit the setting
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns on each call that its time limit is disabled
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = os.read(0, 1)
        if not chunk:
            return
        received += chunk
    reward_fn, seconds = load_reward_function(json.loads(received))
    with contextlib.suppress(ConnectionError, TimeoutError):  # stdin may be a connection to another host
        WorkerPool(reward_fn, reward_fn.reward.workers, seconds).run()


def load_reward_function(setup: Mapping[str, Any]) -> tuple[RewardFunction, float]:
    """Return the reward function of a configuration, and its time limit in seconds."""
    task = TypeAdapter(Annotated[AnyTask, Field(discriminator="name")]).validate_python(setup["task"])
    reward = Reward.model_validate(setup["reward"])
    return RewardFunction(task, reward, setup["max_new_tokens"]), reward.seconds


if __name__ == "__main__":
    main()
