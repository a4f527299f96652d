"""Verification on other hosts: jobs go to the verifier hosts of a registry, and to another host if one is lost."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group
from megatron_rl.errors import DataError
from megatron_rl.tasks import wire
from megatron_rl.tasks.base import Verdict, unverified
from megatron_rl.tasks.host_registry import Address, read_hosts
from megatron_rl.tasks.pool import MAX_RESTARTS, PendingJob, Verdicts, gather, worker_setup
from megatron_rl.tasks.verifier_host import KEY, keep_alive, read_line

logger = logging.getLogger(__name__)
START_SECONDS = 60.0
"""How long a run waits for its first verifier host."""
NO_HOST_SECONDS = 300.0
"""Jobs that no host could take for so long stay unverified."""
_CONNECT_SECONDS = 10.0
_ANSWER_BYTES = 4096
_POLL_SECONDS = 2.0
_WARN_SECONDS = 10.0


class HostConnection:
    """A connection to a verifier host, and the jobs that it has not answered."""

    def __init__(self, address: Address, setup: bytes) -> None:
        self.address = address
        self.pending: dict[int, PendingJob] = {}
        self._socket = socket.create_connection(address, _CONNECT_SECONDS)
        self._writing = threading.Lock()
        try:
            self._socket.sendall(wire.encode_line({"key": os.environ.get(KEY, "")}))
            answer = read_line(self._socket, _ANSWER_BYTES, _CONNECT_SECONDS)
            if b'"ok"' not in answer:
                raise ConnectionRefusedError(answer.decode(errors="replace").strip() or "the connection was closed")
            keep_alive(self._socket)
            self._socket.sendall(setup)
        except OSError:
            self._socket.close()
            raise

    def send(self, line: bytes) -> None:
        """Send a job; if the connection is lost, its reader notices."""
        with self._writing, contextlib.suppress(OSError):
            self._socket.sendall(line)

    def answers(self) -> Iterator[bytes]:
        """Yield the lines that the host sends, until the connection is lost."""
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            yield from lines

    def close(self) -> None:
        """Close the connection; its reader ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class VerifierHosts:
    """Verifies on the hosts of ``reward.registry``, each with ``reward.workers`` processes.

    A job goes to the host with the fewest open jobs. If a host is lost, its open jobs are sent to the others. The
    registry is read again every two seconds, so hosts may join, leave and come back.
    """

    def __init__(self, run: Run) -> None:
        assert run.reward.registry is not None, "open_verifier looked"
        self._registry, self._setup = Path(run.reward.registry), wire.encode_line(worker_setup(run))
        self._lock = threading.Lock()
        self._numbers = count()
        self._hosts: list[HostConnection] = []
        self._readers: list[threading.Thread] = []
        self._waiting: deque[PendingJob] = deque()
        """Jobs without a host."""
        self._problems: dict[Address, str] = {}
        self._last_host = time.monotonic()
        self._closing = threading.Event()
        self._wait_for_a_host()
        self._watcher = threading.Thread(target=self._watch, name="verifier hosts", daemon=True)
        self._watcher.start()

    def submit(self, groups: Sequence[Group]) -> Future[list[Verdicts]]:
        """Send the jobs to hosts and return a future of the verdicts."""
        futures: list[list[Future[Verdict]]] = []
        for group in groups:
            jobs = [PendingJob(wire.encode_job(0, group.prompt, response), Future()) for response in group.responses]
            futures.append([job.verdict for job in jobs])
            self._send(jobs)
        return gather(futures)

    def close(self) -> None:
        """Close the connections, which ends their processes on the hosts; open jobs stay unverified."""
        self._closing.set()
        with self._lock:
            hosts = list(self._hosts)
        for host in hosts:
            host.close()
        for thread in (self._watcher, *self._readers):
            thread.join()
        self._settle_lost([*self._waiting], "the run ended")

    def _send(self, jobs: Iterable[PendingJob]) -> None:
        for job in jobs:
            with self._lock:
                host = min(self._hosts, key=lambda host: len(host.pending), default=None)
                if host is None:
                    self._waiting.append(job)
                    continue
                number = next(self._numbers)
                host.pending[number] = job
            host.send(wire.renumber_job(job.line, number))

    def _connect(self, address: Address) -> None:
        try:
            host = HostConnection(address, self._setup)
        except OSError as error:
            self._problems[address] = str(error)
            return
        self._problems.pop(address, None)
        reader = threading.Thread(target=self._read, args=(host,), name="verdicts", daemon=True)
        with self._lock:
            self._hosts.append(host)
            self._readers = [*(thread for thread in self._readers if thread.is_alive()), reader]
            waiting, self._waiting = self._waiting, deque()
        reader.start()
        self._send(waiting)

    def _read(self, host: HostConnection) -> None:
        for line in host.answers():
            if not line.endswith(b"\n"):
                break  # cut off
            message = json.loads(line)
            with self._lock:
                job = host.pending.pop(message["job"])
            job.verdict.set_result(Verdict(**message["verdict"]))
        with self._lock:
            self._hosts.remove(host)
            open_jobs = list(host.pending.values())
            host.pending.clear()
        host.close()
        for job in open_jobs:
            job.restarts += 1
        unanswered = [job for job in open_jobs if self._closing.is_set() or job.restarts > MAX_RESTARTS]
        self._settle_lost(unanswered, "its verifier host was lost")
        again = [job for job in open_jobs if not job.verdict.done()]
        if not self._closing.is_set():
            name = "{}:{}".format(*host.address)
            logger.warning("lost the verifier host %s; %d verifications are repeated on others", name, len(again))
        self._send(again)

    def _settle_lost(self, jobs: Iterable[PendingJob], reason: str) -> None:
        for job in jobs:
            job.verdict.set_result(unverified("raised", f"{reason} ({job.restarts} times asked again)"))

    def _connect_new(self) -> None:
        try:
            addresses = read_hosts(self._registry)
        except DataError as error:
            self._problems[str(self._registry), 0] = str(error)
            return
        self._problems = {address: self._problems[address] for address in addresses if address in self._problems}
        for address in set(addresses) - {host.address for host in self._hosts}:
            self._connect(address)
        if self._hosts:
            self._last_host = time.monotonic()

    def _watch(self) -> None:
        warned = time.monotonic()
        while not self._closing.wait(_POLL_SECONDS):
            self._connect_new()
            waited = time.monotonic() - self._last_host
            if self._waiting and time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                logger.warning(
                    "%d responses have waited %.0f s for a verifier host%s", len(self._waiting), waited, self._why()
                )
            if waited > NO_HOST_SECONDS:
                with self._lock:
                    lost, self._waiting = self._waiting, deque()
                self._settle_lost(lost, f"no verifier host for {NO_HOST_SECONDS:g} s")

    def _wait_for_a_host(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._hosts:
            self._connect_new()
            if not self._hosts and time.monotonic() > deadline:
                raise DataError(
                    f"no verifier host of {self._registry} (reward.registry) has answered for {START_SECONDS:g} s"
                    f"{self._why()}; start some: python -m megatron_rl.tasks.verifier_host --registry {self._registry}"
                )
            self._closing.wait(0 if self._hosts else 0.2)

    def _why(self) -> str:
        problems = [f"{host}:{port}: {problem}" for (host, port), problem in list(self._problems.items())]
        return f" ({'; '.join(problems)})" if problems else " (no addresses)"
