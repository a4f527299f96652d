"""``python -m megatron_rl.tasks.worker``: verifies what comes on stdin, in processes that may hang or die.

    owner --jobs--> this process --one job each--> workers, forked: a verifier that raises ends its worker,
          <-verdicts--           <--verdict--      one that takes too long is killed; a new one is forked

This process runs no verifier itself, so it always answers. It ends when its stdin does, and its workers with it.
"""

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
from megatron_rl.util.child_process import end_with_parent

DATA_BYTES = 4 << 30
"""Of memory that a worker may fill; beyond that the verifier gets a MemoryError."""

_CHUNK = 1 << 16


@dataclass
class Worker:
    """A forked process and what it works on."""

    pid: int
    jobs: int
    """Descriptor that it reads jobs from."""
    verdicts: int
    """Descriptor that it writes verdicts to."""
    work: list[tuple[int, bytes]] = field(default_factory=list)
    """Numbers and lines of the jobs that it has: one to judge, or many to ask servers about."""
    deadline: float = 0.0
    heard: bytearray = field(default_factory=bytearray)


class WorkerPool:
    """Keeps workers busy, and makes new ones for those that are lost."""

    def __init__(self, judge: RewardFunction, workers: int, seconds: float) -> None:
        self.judge, self.seconds = judge, seconds
        self.queue: deque[tuple[int, bytes]] = deque()
        self.unasked: deque[tuple[int, bytes]] = deque()
        """Jobs that servers are to be asked about first, many at once; empty if there is no such server."""
        self.workers = [self._fork() for _ in range(workers)]

    def run(self) -> None:
        """Take jobs and answer them until stdin ends."""
        heard = bytearray()
        while True:
            self._assign()
            descriptors = [0, *(worker.verdicts for worker in self.workers)]
            ready = select.select(descriptors, [], [], self._patience())[0]
            if 0 in ready:
                chunk = os.read(0, _CHUNK)
                if not chunk:
                    return
                heard += chunk
                *lines, heard = heard.split(b"\n")
                new = [(json.loads(said)["job"], bytes(said) + b"\n") for said in lines]
                (self.unasked if self.judge.servers else self.queue).extend(new)
            for at, worker in enumerate(self.workers):
                if worker.verdicts in ready:
                    self._hear(at)
                elif worker.work and time.monotonic() >= worker.deadline:
                    why = f"took longer than {self.seconds:g} s (reward.seconds)"
                    self._answer(worker, unverified("timed_out", why))
                    self._replace(at)

    def _assign(self) -> None:
        for worker in self.workers:
            if worker.work or not (self.queue or self.unasked):
                continue
            if self.queue:
                worker.work = [self.queue.popleft()]
                said = worker.work[0][1]
            else:
                most = min(self.judge.reward.http_batch, len(self.unasked))
                worker.work = [self.unasked.popleft() for _ in range(most)]
                said = wire.ask([job for _, job in worker.work])
            worker.deadline = time.monotonic() + self.seconds
            _write(worker.jobs, said)

    def _patience(self) -> float | None:
        deadlines = [worker.deadline for worker in self.workers if worker.work]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _hear(self, at: int) -> None:
        worker = self.workers[at]
        chunk = os.read(worker.verdicts, _CHUNK)
        worker.heard += chunk
        if worker.heard.endswith(b"\n"):
            said = json.loads(worker.heard)
            worker.heard.clear()
            if "asked" in said:
                known = zip(worker.work, said["asked"], strict=True)
                self.queue += [(number, wire.known(job, verdicts)) for (number, job), verdicts in known]
                worker.work = []
                return
            self._answer(worker, Verdict(**said["verdict"]))
            if said["last"]:
                self._replace(at)
        elif not chunk:
            self._answer(
                worker, unverified("raised", "its process died (out of memory, or a crash of the interpreter)")
            )
            self._replace(at)

    def _answer(self, worker: Worker, verdict: Verdict) -> None:
        for number, _ in worker.work:
            _write(1, wire.line({"job": number, "verdict": asdict(verdict)}))
        worker.work = []

    def _replace(self, at: int) -> None:
        worker = self.workers[at]
        os.killpg(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        os.close(worker.jobs)
        os.close(worker.verdicts)
        self.workers[at] = self._fork()

    def _fork(self) -> Worker:
        """Return a new worker; in the worker itself, never."""
        jobs_read, jobs_write = os.pipe()
        verdicts_read, verdicts_write = os.pipe()
        nursery = os.getpid()
        pid = os.fork()
        if pid:
            os.close(jobs_read)
            os.close(verdicts_write)
            os.setpgid(pid, pid)
            return Worker(pid, jobs_write, verdicts_read)
        _work(self.judge, nursery, jobs_read, verdicts_write)
        raise AssertionError(f"worker {os.getpid()} came back")


def _work(judge: RewardFunction, nursery: int, jobs: int, verdicts: int) -> None:
    """Be a worker; whatever a verifier raises ends here, with this process, and not in the code of the nursery."""
    try:
        _serve(judge, nursery, jobs, verdicts)
    finally:
        error = sys.exc_info()[1]
        if error is not None:
            failure = "timed_out" if isinstance(error, TimeoutError) else "raised"
            _write(verdicts, wire.verdict(unverified(failure, f"{type(error).__name__}: {error}"[:500]), last=True))
        os._exit(0 if error is None else 1)


def _serve(judge: RewardFunction, nursery: int, jobs: int, verdicts: int) -> None:
    """Judge one job after the other until there are no more."""
    os.setpgid(0, 0)
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a verifier prints must not get among the verdicts
    with os.fdopen(jobs, "rb") as lines:
        while os.getppid() == nursery and (said := lines.readline()):
            asked = json.loads(said)
            if "jobs" in asked:
                _write(verdicts, wire.asked(judge.ask([wire.read_job(job) for job in asked["jobs"]])))
            else:
                _write(verdicts, wire.verdict(judge.verify(*wire.read_job(asked), wire.read_known(asked))))


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def main() -> None:
    """Read the configuration, then work."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once a call that we limit the time
    heard = bytearray()
    while not heard.endswith(b"\n"):
        chunk = os.read(0, 1)
        if not chunk:
            return
        heard += chunk
    judge, seconds = load_reward_function(json.loads(heard))
    WorkerPool(judge, judge.reward.workers, seconds).run()


def load_reward_function(asked: Mapping[str, Any]) -> tuple[RewardFunction, float]:
    """Return the judge of a configuration, and its time limit."""
    task = TypeAdapter(Annotated[AnyTask, Field(discriminator="name")]).validate_python(asked["task"])
    reward = Reward.model_validate(asked["reward"])
    return RewardFunction(task, reward, asked["max_new_tokens"]), reward.seconds


if __name__ == "__main__":
    main()
