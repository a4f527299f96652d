"""Which weights the fleet has, and how every member gets them."""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts
from megatron_rl.fleet.protocol import ServerUnreachable

NamedTensors = Sequence[tuple[str, Tensor]]
UNNAMED = "default"
"""The version that a server reports while nobody has named its weights."""
log = logging.getLogger(__name__)


class Report(Protocol):
    """What a finished push says; see ``megatron_rl.weights``, which this package does not import."""

    @property
    def failed(self) -> Mapping[str, RolloutError]:
        """Server url -> why it does not have the weights."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of weights."""
        ...

    @property
    def seconds(self) -> float:
        """From begin to end."""
        ...


class WeightUpdate(Protocol):
    """A push under way."""

    async def send(self, bucket: NamedTensors) -> None:
        """Send a bucket."""

    async def finish(self) -> Report:
        """Put the weights to use."""
        ...


class WeightTransport(Protocol):
    """A way for weights to reach servers."""

    async def begin(self, servers: Sequence[Client], version: int) -> WeightUpdate:
        """Open a push."""
        ...

    def open(self) -> None:
        """Called in the trainer's thread when a push has begun."""

    def join(self, push: Any) -> None:
        """Called in the trainer's thread after the last bucket."""

    async def repeat(self, servers: Sequence[Client], version: int) -> Report | None:
        """Give servers the newest version once more; None: it would have to be sent again."""

    def buckets(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Cut the tensors into buckets."""
        ...


class WeightSync:
    """The weights of the fleet. One push at a time: ``begin``, the push's ``send``, ``end``, and always ``release``."""

    def __init__(
        self, carrier: WeightTransport, patience: Timeouts, pause_mode: Literal["retract", "abort"] = "retract"
    ) -> None:
        self.carrier = carrier
        self.patience = patience
        self.pause_mode: Literal["retract", "abort"] = pause_mode
        """What becomes of responses in the making: they go on after the push, or are answered as far as they are."""
        self.pushes = 0
        """Begun so far."""
        self.version: str | None = None
        """Of the newest push; None before the first."""
        self._kept: list[NamedTensors] = []
        self._lock = asyncio.Lock()
        self._paused: list[Member] = []
        self._pushing = False
        self._settled = asyncio.Event()
        self._settled.set()

    async def settled(self) -> None:
        """Wait while a push is under way."""
        await self._settled.wait()

    async def begin(self, members: Sequence[Member], version: int) -> WeightUpdate:
        """Pause the ready members, and those that wait for a push, and open one to them."""
        await self._lock.acquire()
        self._pushing = True
        self.pushes += 1
        self._settled.clear()
        for member in members:
            if member.waits:
                member.join()
        ready = [member for member in members if member.ready]
        await asyncio.gather(*(self._pause(member) for member in ready))
        self._paused = [member for member in ready if member.ready]
        for member in self._paused:
            member.paused = True
        return await self.carrier.begin([member.client for member in self._paused], version)

    async def end(self, push: WeightUpdate, version: int, kept: list[NamedTensors]) -> Report:
        """Finish the push; members that failed leave the fleet."""
        report = await push.finish()
        # With these three set, a member that failed or was away catches up on its way back.
        self.version, self._kept = str(version), kept
        for member in self._paused:
            if member.url in report.failed:
                member.leave(report.failed[member.url], self.patience)
            else:
                member.version = self.version
                await self._flush(member)
        refusals = [error for error in report.failed.values() if not isinstance(error, ServerUnreachable)]
        if self._paused and len(refusals) == len(self._paused):
            raise RolloutError(f"no server took the weights of version {version}: {refusals[0]}") from refusals[0]
        return report

    async def release(self) -> None:
        """Let the members go on, whatever became of the push."""
        try:
            await asyncio.gather(*(self._resume(member) for member in self._paused if member.ready))
        finally:
            for member in self._paused:
                member.paused = False
            self._paused = []
            self._settled.set()
            if self._pushing:
                self._pushing = False
                self._lock.release()

    async def catch_up(self, member: Member) -> None:
        """Give a member that was away the weights of the fleet, and make sure that it is not paused."""
        async with self._lock:
            await member.client.resume()
            if self.version is None or member.version == self.version:
                return
            report = await self.carrier.repeat([member.client], int(self.version))
            if report is None:
                report = await self._push_kept(member, self.version)
            for error in report.failed.values():
                raise error
            log.info("%s had weights %s and now has %s", member.url, member.version, self.version)
            member.version = self.version
            await member.client.flush()

    async def _push_kept(self, member: Member, version: str) -> Report:
        if not self._kept:
            member.waits = True
            raise RolloutError(
                f"{member.url} has weights {member.version}, the fleet {version}: it waits for the next push"
            )
        push = await self.carrier.begin([member.client], int(version))
        for bucket in self._kept:
            await push.send(bucket)
        return await push.finish()

    async def require(self, member: Member, version: str) -> None:
        """Make sure that a member has the weights of this version; one that nobody named yet gets the name."""
        if member.version == version:
            return
        if self.version is None and member.version == UNNAMED:
            await member.client.set_version(version)
            member.version = version
        elif self.version == version:
            await self.catch_up(member)
        else:
            raise RolloutError(f"{member.url} has weights {member.version}, {version} were asked for; push them first")

    async def _pause(self, member: Member) -> None:
        try:
            # A pause is answered at once: a server that hangs must not hold up the push to the others.
            await member.client.pause(self.pause_mode, self.patience.pause_timeout_seconds)
        except RolloutError as error:
            member.leave(error, self.patience)

    async def _flush(self, member: Member) -> None:
        # Cached prefixes were computed with the old weights.
        try:
            await member.client.flush()
        except RolloutError as error:
            member.leave(error, self.patience)

    async def _resume(self, member: Member) -> None:
        try:
            await member.client.resume()
        except RolloutError as error:
            member.leave(error, self.patience)
