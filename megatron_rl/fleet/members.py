"""The servers of a fleet: which are fit to be asked, and how one comes back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import Sample, SampleRequest, ServerUnreachable

log = logging.getLogger(__name__)
_LONGEST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class Timeouts:
    """How long to wait for what, in seconds."""

    request_timeout_seconds: float = 600.0
    """A request without an answer for this long is sent elsewhere."""
    control_timeout_seconds: float = 120.0
    """A bucket of weights or a checksum without an answer for this long has failed."""
    pause_timeout_seconds: float = 20.0
    """A server that is not paused this long after it was asked misses the push."""
    start_timeout_seconds: float = 300.0
    """A server that is not healthy this long after its start is an error; so is a fleet that has none for so long."""
    probe_seconds: float = 2.0
    """Between two looks at a server."""
    probe_timeout_seconds: float = 10.0
    """A health check without an answer for this long has failed; SGLang needs a second at the very least."""
    probe_failures: int = 3
    """Health checks in a row that a busy server may miss before its requests are sent elsewhere."""
    attempts: int = 4
    """Times that a request is tried."""


@dataclass(eq=False)
class Member:
    """One server."""

    client: Client
    process: ServerProcess | None = None
    """If the fleet started it; then it is started again when it has died."""
    ready: bool = False
    version: str = ""
    """Of the weights it has, as far as the fleet knows."""
    waits_for_push: bool = False
    """It is well, but has old weights, and gets new ones with the next push only."""
    reason: str = "not asked yet"
    """Why it is not ready."""
    failures: int = 0
    """Failures since its last good answer: each doubles the time until it is looked at again."""
    retry_at: float = 0.0
    paused: bool = False
    """For a push: it generates nothing, and SGLang's health check, which does, would fail."""
    missed: int = 0
    """Health checks missed in a row."""
    rows: int = 0
    """Sequences that it works on."""
    requests: set[asyncio.Task[list[Sample]]] = field(default_factory=set)
    _busy_seconds: float = 0.0
    _busy_since: float = 0.0

    @property
    def url(self) -> str:
        """Its name."""
        return self.client.url

    @property
    def busy_seconds(self) -> float:
        """How long it has had a request to work on, so far."""
        return self._busy_seconds + (time.monotonic() - self._busy_since if self.requests else 0.0)

    def leave(self, error: RolloutError | str, patience: Timeouts) -> None:
        """Take it out of the fleet for a while; what it works on is given up."""
        if not self.ready:
            return
        log.warning("%s leaves the fleet: %s", self.url, error)
        self.ready, self.missed = False, 0
        self.postpone(error, patience)
        for request in self.requests:
            request.cancel()

    def postpone(self, error: RolloutError | str, patience: Timeouts) -> None:
        """Look at it again later, each time twice as late."""
        self.reason = str(error)
        wait = min(_LONGEST_BACKOFF_SECONDS, patience.probe_seconds * 2**self.failures)
        self.retry_at, self.failures = time.monotonic() + wait, self.failures + 1

    def join(self) -> None:
        """Let it take requests."""
        log.info("%s is in the fleet with weights %s", self.url, self.version)
        self.ready, self.reason, self.missed, self.waits_for_push = True, "", 0, False

    async def generate(self, requests: Sequence[SampleRequest], version: Collection[str] | None) -> list[Sample]:
        """Ask it; ServerUnreachable if it is taken out of the fleet meanwhile."""
        task = asyncio.ensure_future(self.client.generate(requests, version))
        self._busy_since = self._busy_since if self.requests else time.monotonic()
        self.requests.add(task)
        self.rows += len(requests)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            self._busy_seconds = self.busy_seconds
            self._busy_since = time.monotonic()
            self.requests.discard(task)
            self.rows -= len(requests)
        if task.cancelled():
            raise ServerUnreachable(f"{self.url} was given up: {self.reason}")
        samples = task.result()
        self.failures = 0
        return samples


async def wait_until_healthy(member: Member, patience: Timeouts) -> None:
    """Wait for a server that is starting."""
    deadline = time.monotonic() + patience.start_timeout_seconds
    while not await member.client.healthy(patience.probe_timeout_seconds):
        status = None if member.process is None else member.process.exit_status
        if status is None and time.monotonic() < deadline:
            await asyncio.sleep(min(0.2, patience.probe_seconds))
            continue
        what = f"has not become healthy within {patience.start_timeout_seconds:g} s"
        if status is not None:
            what = f"ended with status {status} while starting"
        end = f"; its log {member.process.log_path} ends:\n{member.process.log_tail()}" if member.process else ""
        raise RolloutError(f"the server {member.url} {what}{end}")


async def watch(
    member: Member, patience: Timeouts, catch_up: Callable[[Member], Awaitable[None]], changed: Callable[[], None]
) -> None:
    """Look after one server for ever: notice that it died or hangs, and bring it back when it can."""
    while True:
        await asyncio.sleep(patience.probe_seconds)
        exited = member.process is not None and member.process.exit_status is not None
        if member.ready and exited:
            assert member.process is not None
            member.leave(f"its process {member.process.pid} ended with status {member.process.exit_status}", patience)
        elif member.ready and member.requests and not member.paused:
            await _probe(member, patience)
        elif not member.ready and time.monotonic() >= member.retry_at:
            await _revive(member, patience, catch_up)
        changed()


async def _probe(member: Member, patience: Timeouts) -> None:
    healthy = await member.client.healthy(patience.probe_timeout_seconds)
    member.missed = 0 if healthy else member.missed + 1
    if member.missed >= patience.probe_failures:
        member.leave(f"it missed {member.missed} health checks in a row", patience)


async def _revive(member: Member, patience: Timeouts, catch_up: Callable[[Member], Awaitable[None]]) -> None:
    try:
        if member.process is not None and member.process.exit_status is not None:
            member.process.start()
        if not await member.client.healthy(patience.probe_timeout_seconds):
            member.postpone(member.reason, patience)
            return
        member.version = await member.client.version()
        await catch_up(member)
    except RolloutError as error:
        member.postpone(error, patience)
        return
    member.join()
