"""The version of the weights that the fleet serves, and how every server gets it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Literal

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.members import Member, Timeouts
from megatron_rl.fleet.protocol import ServerUnreachable
from megatron_rl.weights.transport import NamedTensors, UpdateReport, WeightTransport, WeightUpdate

UNSET_VERSION = "default"
"""The version that a server reports before anyone has set it."""
log = logging.getLogger(__name__)


class WeightSync:
    """The weights of the fleet.

    One push at a time: ``begin``, the update's ``send`` for each bucket, ``end``, and ``release`` in any case.
    """

    def __init__(
        self,
        transport: WeightTransport,
        timeouts: Timeouts,
        pause_mode: Literal["retract", "abort"] = "retract",
        pause_at: Literal["begin", "end"] = "begin",
    ) -> None:
        self.transport = transport
        self.timeouts = timeouts
        self.pause_mode: Literal["retract", "abort"] = pause_mode
        """What a push does to unfinished responses: they continue after it, or are returned incomplete."""
        self.pause_at: Literal["begin", "end"] = pause_at
        """When a push pauses servers: before the first bucket, or after the last; the latter only if they apply nothing
        before the end."""
        self.pushes = 0
        """Pushes begun so far."""
        self.version: str | None = None
        """Version of the newest push; None before the first."""
        self._copy: list[NamedTensors] = []
        """The buckets of the newest push, if the fleet keeps a copy of the weights."""
        self._lock = asyncio.Lock()
        self._updated: list[Member] = []
        """The servers of the push that is in progress."""
        self._pushing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._serving = asyncio.Event()
        self._serving.set()

    async def wait_until_idle(self) -> None:
        """Wait until no push is in progress."""
        await self._idle.wait()

    async def wait_until_serving(self) -> None:
        """Wait until no push has paused servers."""
        await self._serving.wait()

    async def begin(self, members: Sequence[Member], version: int) -> WeightUpdate:
        """Open an update of the servers that are ready or wait for a push, and pause them if that is due."""
        await self._lock.acquire()
        self._pushing = True
        self.pushes += 1
        self._idle.clear()
        joining = [member for member in members if member.waits_for_push]
        for member in joining:
            member.join()
        ready = [member for member in members if member.ready]
        late = await asyncio.gather(*(self._is_paused_late(member) for member in ready))
        early = {member for member, is_late in zip(ready, late, strict=True) if not is_late}
        await self._pause([member for member in ready if member in early or member in joining])
        self._updated = [member for member in ready if member.ready]
        return await self.transport.begin([member.client for member in self._updated], version)

    async def end(self, update: WeightUpdate, version: int, copy: list[NamedTensors]) -> UpdateReport:
        """Finish the update; servers that failed leave the fleet.

        Raises:
            RolloutError: every server refused the weights.
        """
        await self._pause([member for member in self._updated if member.ready and not member.paused])
        report = await update.finish()
        # From here on, a server that failed or was away gets this version when it comes back.
        self.version, self._copy = str(version), copy
        for member in self._updated:
            if member.url in report.failed:
                member.leave(report.failed[member.url], self.timeouts)
            else:
                member.version = self.version
                await self._flush(member)
        refusals = [error for error in report.failed.values() if not isinstance(error, ServerUnreachable)]
        if self._updated and len(refusals) == len(self._updated):
            raise RolloutError(f"no server took the weights of version {version}: {refusals[0]}") from refusals[0]
        return report

    async def release(self) -> None:
        """Resume the paused servers, whether the push succeeded or failed."""
        try:
            await asyncio.gather(*(self._resume(member) for member in self._updated if member.ready))
        finally:
            for member in self._updated:
                member.paused = False
            self._updated = []
            self._idle.set()
            self._serving.set()
            if self._pushing:
                self._pushing = False
                self._lock.release()

    async def catch_up(self, member: Member) -> None:
        """Bring the fleet's weights to a server that was away, and make sure that it is not paused."""
        async with self._lock:
            await member.client.resume()
            if self.version is None or member.version == self.version:
                return
            report = await self.transport.resend([member.client], int(self.version))
            if report is None:
                report = await self._send_copy(member, self.version)
            for error in report.failed.values():
                raise error
            log.info("Server %s received weights version %s (it had %s)", member.url, self.version, member.version)
            member.version = self.version
            await member.client.flush()

    async def _send_copy(self, member: Member, version: str) -> UpdateReport:
        if not self._copy:
            member.waits_for_push = True
            raise RolloutError(
                f"{member.url} has weights {member.version}, the fleet {version}: it waits for the next push"
            )
        update = await self.transport.begin([member.client], int(version))
        for bucket in self._copy:
            await update.send(bucket)
        return await update.finish()

    async def require(self, member: Member, version: str) -> None:
        """Make sure that a server has the weights of this version; a server without a version is given it."""
        if member.version == version:
            return
        if self.version is None and member.version == UNSET_VERSION:
            await member.client.set_version(version)
            member.version = version
        elif self.version == version:
            await self.catch_up(member)
        else:
            raise RolloutError(f"{member.url} has weights {member.version}, not {version}; push them first")

    async def _is_paused_late(self, member: Member) -> bool:
        if self.pause_at == "begin":
            return False
        try:
            return (await member.client.receiver()).is_streamed
        except RolloutError as error:
            member.leave(error, self.timeouts)
            return False

    async def _pause(self, members: Sequence[Member]) -> None:
        """Pause servers; requests wait from here on until the push is over."""
        if members or self.pause_at == "begin":
            self._serving.clear()
        await asyncio.gather(*(self._pause_one(member) for member in members))
        for member in members:
            member.paused = member.ready

    async def _pause_one(self, member: Member) -> None:
        try:
            # A pause is answered at once: a server that hangs must not delay the push to the others.
            await member.client.pause(self.pause_mode, self.timeouts.pause_timeout_seconds)
        except RolloutError as error:
            member.leave(error, self.timeouts)

    async def _flush(self, member: Member) -> None:
        # Cached prefixes were computed with the previous weights.
        try:
            await member.client.flush()
        except RolloutError as error:
            member.leave(error, self.timeouts)

    async def _resume(self, member: Member) -> None:
        try:
            await member.client.resume()
        except RolloutError as error:
            member.leave(error, self.timeouts)
