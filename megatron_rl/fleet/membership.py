"""Servers that join and leave a fleet while it is open: one task per server checks it, another follows the registry."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, monitor
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.quantization import FormJudge, FormRefused, require_form
from megatron_rl.fleet.receivers import Receiver
from megatron_rl.fleet.registry import Registry
from megatron_rl.fleet.sync import WeightSync

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Membership:
    """The servers of a fleet, and the tasks that watch them; use it from one event loop."""

    sync: WeightSync
    timeouts: Timeouts
    client: type[Client]
    """Client class of the servers' engine."""
    receivers: Sequence[Receiver]
    """Processes that receive the servers' answers; none: this one does."""
    judge: FormJudge | None = None
    """Refuses servers for the form of their weights; None: no server is asked."""
    members: list[Member] = field(default_factory=list)
    _tasks: dict[Member, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _watcher: asyncio.Task[None] | None = field(default=None, init=False)
    _numbers: "count[int]" = field(default_factory=count, init=False)

    def add(self, server: ServerProcess | str) -> Member:
        """Add a server that takes no requests yet."""
        process = None if isinstance(server, str) else server
        url = server if isinstance(server, str) else server.url
        client = self.client(url, None, self.timeouts.control_timeout_seconds, retries=2)
        receiver = self.receivers[next(self._numbers) % len(self.receivers)] if self.receivers else None
        member = Member(client, process, timeouts=self.timeouts, receiver=receiver)
        self.members.append(member)
        return member

    def monitor(
        self,
        member: Member,
        changed: Callable[[], None],
        catch_up: Callable[[Member], Awaitable[None]] | None = None,
    ) -> None:
        """Check a server from now on; see ``members.monitor`` for the arguments."""
        self._tasks[member] = asyncio.ensure_future(monitor(member, self.timeouts, catch_up or self._catch_up, changed))

    def follow(self, registry: Registry, changed: Callable[[], None]) -> None:
        """From now on, add servers whose addresses appear in the registry, and drop those whose addresses are gone."""
        self._watcher = asyncio.ensure_future(self._follow(registry, changed))

    async def close(self) -> None:
        """End the tasks, and close all connections and the receiver processes."""
        for task in [*self._tasks.values(), *([self._watcher] if self._watcher else [])]:
            task.cancel()
        for member in {*self.members, *self._tasks}:
            await member.client.close()
        for receiver in self.receivers:
            receiver.close()

    async def _follow(self, registry: Registry, changed: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(self.timeouts.probe_seconds)
            if (urls := await asyncio.to_thread(registry.changed_urls)) is None:
                continue
            dropped = [member for member in self.members if member.url not in urls]
            for member in dropped:
                self._drop(member)
            for url in urls:
                if all(member.url != url for member in self.members):
                    self.monitor(self.add(url), changed)
            if dropped:
                changed()
                await self.sync.wait_until_idle()  # a push that has begun ends its calls to these servers
                for member in dropped:
                    await member.client.close()

    def _drop(self, member: Member) -> None:
        """Forget a server; its requests are sent to other servers."""
        self._tasks.pop(member).cancel()
        self.members.remove(member)
        member.leave("it is not registered any more", self.timeouts)

    async def _catch_up(self, member: Member) -> None:
        """Bring the fleet's weights to a server that comes back, or that is new."""
        await self.require_form(member)
        if not member.has_joined:
            await self._examine(member)
        await self.sync.catch_up(member)

    async def require_form(self, member: Member) -> None:
        """Ask a server how it holds its weights.

        Raises:
            FormRefused: a push sends them in another form.
        """
        if self.judge is None:
            return
        try:
            await require_form(member.client, self.judge)
        except FormRefused as error:
            if member.reason != str(error):  # it is asked again and again
                log.warning("Server %s cannot join the fleet: %s", member.url, error)
            raise

    async def _examine(self, member: Member) -> None:
        """Distrust the version that a new server reports, which another run may have given to other weights.

        After a push the server gets the weights in any case. Before the first push its checksums must be those of a
        server that is in use.

        Raises:
            RolloutError: no push has happened yet, and its weights differ; it waits for the next push.
        """
        if self.sync.version is not None:
            member.version = "unknown"
            return
        other = next((other for other in self.members if other.ready), None)
        if other is None:
            return
        sums, others = await asyncio.gather(_checksums(member), _checksums(other))
        if sums != others:
            member.waits_for_push = True
            raise RolloutError(f"{member.url} has other weights than {other.url}: it waits for the first push")


async def _checksums(member: Member) -> tuple[str, Mapping[str, str]]:
    return await member.client.checksums()
