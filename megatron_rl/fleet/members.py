"""The servers of a fleet: which of them take requests, and how a failed one comes back."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult, ServerTimeout, ServerUnreachable
from megatron_rl.fleet.receivers import Receiver

log = logging.getLogger(__name__)
_MAX_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True)
class Timeouts:
    """Time limits and retries of a fleet."""

    request_timeout_seconds: float = 600.0
    """A request is sent to another server after so long without progress: its server answered no request, and passed no
    health check. A healthy server may take any time."""
    control_timeout_seconds: float = 120.0
    """A bucket of weights or a checksum without an answer after this time has failed."""
    pause_timeout_seconds: float = 20.0
    """A server that has not paused after this time misses the push."""
    start_timeout_seconds: float = 300.0
    """A server that is not healthy this long after its start is an error; so is a fleet without servers for so long."""
    probe_seconds: float = 2.0
    """Interval between checks of a server."""
    probe_timeout_seconds: float = 10.0
    """A health check without an answer after this time has failed; SGLang needs at least a second."""
    probe_failures: int = 3
    """Consecutive health checks that a busy server may fail before its requests are sent to other servers."""
    attempts: int = 4
    """Attempts per request."""
    request_limit_seconds: float | None = None
    """A request without an answer after this time is sent to another server, even if its server makes progress."""


@dataclass(eq=False)
class Member:
    """One server of the fleet."""

    client: Client
    process: ServerProcess | None = None
    """The server's process if the fleet started it; the fleet restarts it when it has ended."""
    ready: bool = False
    """Whether the server takes requests."""
    version: str = ""
    """Version of the server's weights, as far as the fleet knows."""
    waits_for_push: bool = False
    """The server is healthy, but has old weights and gets the current ones only with the next push."""
    timeouts: Timeouts = Timeouts()
    """Its limits of requests."""
    progress_at: float = 0.0
    """Monotonic time of the newest sign that the server generates tokens."""
    reason: str = "not checked yet"
    """Why the server is not ready."""
    failures: int = 0
    """Failures since the last valid answer; each doubles the time until the next check."""
    retry_at: float = 0.0
    paused: bool = False
    """Paused for a push: it generates nothing, so SGLang's health check, which generates a token, would fail."""
    missed_probes: int = 0
    """Consecutive health checks that failed."""
    num_sequences: int = 0
    """Sequences in its unfinished requests."""
    answers: int = 0
    """Requests that it finished, and health checks that it answered while it had requests."""
    receiver: Receiver | None = None
    """The process that receives the server's answers; None: this one."""
    requests: set[asyncio.Task[list[GenerationResult]]] = field(default_factory=set)
    _joined: bool = False
    _busy_seconds: float = 0.0
    _busy_since: float = 0.0

    @property
    def url(self) -> str:
        """The server's address, which is also its name."""
        return self.client.url

    @property
    def busy_seconds(self) -> float:
        """Total time that the server has had unfinished requests."""
        return self._busy_seconds + (time.monotonic() - self._busy_since if self.requests else 0.0)

    @property
    def has_joined(self) -> bool:
        """Whether the server has taken requests of this fleet before."""
        return self._joined

    def has_room(self, sequences: int, limit: int) -> bool:
        """Return whether the server may get so many more sequences; an idle server may get more than the limit."""
        return not self.requests or self.num_sequences + sequences <= limit

    def leave(self, error: RolloutError | str, timeouts: Timeouts) -> None:
        """Take the server out of the fleet for a while, and cancel its requests."""
        if not self.ready:
            return
        log.warning("Server %s left the fleet: %s", self.url, error)
        self.ready, self.missed_probes = False, 0
        self.postpone(error, timeouts)
        for request in self.requests:
            request.cancel()

    def postpone(self, error: RolloutError | str, timeouts: Timeouts) -> None:
        """Delay the next check of the server; the delay doubles each time."""
        self.reason = str(error)
        wait = min(_MAX_BACKOFF_SECONDS, timeouts.probe_seconds * 2**self.failures)
        wait = (
            wait if self._joined else timeouts.probe_seconds
        )  # a server that registers first and loads its model then
        self.retry_at, self.failures = time.monotonic() + wait, self.failures + 1

    def join(self) -> None:
        """Let the server take requests."""
        verb = "returned to" if self._joined else "joined"
        log.info(
            "Server %s %s the fleet%s", self.url, verb, f" with weights version {self.version}" if self.version else ""
        )
        self.ready, self.reason, self.missed_probes, self.waits_for_push = True, "", 0, False
        self._joined = True

    async def generate(
        self, requests: Sequence[GenerationRequest], version: Collection[str] | None
    ) -> list[GenerationResult]:
        """Send requests to the server.

        Raises:
            ServerTimeout: the server made no progress for ``request_timeout_seconds``.
            ServerUnreachable: the server left the fleet before it answered.
        """
        answer = (
            self.client.generate(requests, version)
            if self.receiver is None
            else self.receiver.generate(self.client, requests, version)
        )
        task = asyncio.ensure_future(answer)
        self._busy_since = self._busy_since if self.requests else time.monotonic()
        self.requests.add(task)
        self.num_sequences += len(requests)
        try:
            await self._wait(task)
        finally:
            task.cancel()
            self._busy_seconds = self.busy_seconds
            self._busy_since = time.monotonic()
            self.requests.discard(task)
            self.num_sequences -= len(requests)
        if task.cancelled():
            raise ServerUnreachable(f"{self.url} left the fleet: {self.reason}")
        results = task.result()
        self.failures, self.answers, self.progress_at = 0, self.answers + 1, time.monotonic()
        return results

    async def _wait(self, task: asyncio.Task[list[GenerationResult]]) -> None:
        """Wait for an answer as long as the server makes progress."""
        started, limits = time.monotonic(), self.timeouts
        while not task.done():
            now = time.monotonic()
            if self.paused:  # for a push, however long
                self.progress_at = now
            silent_seconds = now - max(started, self.progress_at)
            left_seconds = limits.request_timeout_seconds - silent_seconds
            if left_seconds <= 0:
                raise ServerTimeout(
                    f"{self.url} made no progress for {silent_seconds:.0f} s (rollout.request_timeout_seconds)"
                )
            if limits.request_limit_seconds is not None:
                left_seconds = min(left_seconds, started + limits.request_limit_seconds - now)
                if left_seconds <= 0:
                    limit = limits.request_limit_seconds
                    raise ServerTimeout(f"{self.url} took longer than {limit:g} s (rollout.request_limit_seconds)")
            await asyncio.wait([task], timeout=left_seconds)


async def wait_until_healthy(member: Member, timeouts: Timeouts) -> None:
    """Wait for a server that is starting.

    Raises:
        RolloutError: its process ended, or it is not healthy after ``start_timeout_seconds``.
    """
    deadline = time.monotonic() + timeouts.start_timeout_seconds
    while not await member.client.healthy(timeouts.probe_timeout_seconds):
        status = None if member.process is None else member.process.exit_status
        if status is None and time.monotonic() < deadline:
            await asyncio.sleep(min(0.2, timeouts.probe_seconds))
            continue
        problem = f"has not become healthy within {timeouts.start_timeout_seconds:g} s"
        if status is not None:
            problem = f"ended with status {status} while starting"
        tail = f"; its log {member.process.log_path} ends:\n{member.process.log_tail()}" if member.process else ""
        raise RolloutError(f"the server {member.url} {problem}{tail}")


async def monitor(
    member: Member, timeouts: Timeouts, catch_up: Callable[[Member], Awaitable[None]], changed: Callable[[], None]
) -> None:
    """Check one server until cancelled: take it out when it ends or hangs, and bring it back when it is healthy again.

    Args:
        member: the server.
        timeouts: intervals and limits of the checks.
        catch_up: brings the current weights to a server that comes back.
        changed: called after each check.
    """
    while True:
        await asyncio.sleep(timeouts.probe_seconds)
        exited = member.process is not None and member.process.exit_status is not None
        if member.ready and exited:
            assert member.process is not None
            member.leave(f"its process {member.process.pid} ended with status {member.process.exit_status}", timeouts)
        elif member.ready and member.requests and not member.paused:
            await _probe(member, timeouts)
        elif not member.ready and time.monotonic() >= member.retry_at:
            await _recover(member, timeouts, catch_up)
        changed()


async def _probe(member: Member, timeouts: Timeouts) -> None:
    healthy = await member.client.healthy(timeouts.probe_timeout_seconds)
    if healthy and member.client.health_is_progress:
        member.progress_at = time.monotonic()
    member.missed_probes = 0 if healthy else member.missed_probes + 1
    member.answers += healthy
    if member.missed_probes >= timeouts.probe_failures:
        member.leave(f"it failed {member.missed_probes} health checks in a row", timeouts)


async def _recover(member: Member, timeouts: Timeouts, catch_up: Callable[[Member], Awaitable[None]]) -> None:
    try:
        if member.process is not None and member.process.exit_status is not None:
            member.process.start()
        if not await member.client.healthy(timeouts.probe_timeout_seconds):
            member.postpone(member.reason, timeouts)
            return
        member.version = await member.client.version()
        await catch_up(member)
    except RolloutError as error:
        if not member.ready:
            member.postpone(error, timeouts)
        return
    if not member.ready:  # a push that it waited for may have begun meanwhile
        member.join()
