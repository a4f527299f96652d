"""The sender of one pipeline stage: brings the stage's buckets to all servers of a push.

Servers that receive streams are a chain: the sender streams a bucket to the first one, which passes it on while it
receives. Each bucket enters the chain at another server, so that all servers pass on equally much. A server that does
not answer is left out, and the bucket is sent again to those that it did not reach.

Other servers (SGLang) are one torch.distributed group with the sender, which is kept from push to push and opened
again when a server is lost or joins (``kept_group.py``).
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.checksum import padded_sha256, sums64
from megatron_rl.weights.flat_bucket import FlatBucket
from megatron_rl.weights.kept_group import KeptGroup
from megatron_rl.weights.transport import Checksums, NamedTensors, WeightReceiver, WeightServer
from megatron_rl.weights.weight_group import Backend


class ServerClients(Protocol):
    """The clients of servers, by url."""

    def __call__(self, url: str) -> WeightServer:
        """Return the client of a server."""
        ...

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True)
class StagePlan:
    """What the sender of every stage must know about a push."""

    version: int
    receivers: Sequence[WeightReceiver]
    base: int | None
    """The version that every server has, as this run pushed it; None if some server may have other weights."""

    @property
    def is_streamed(self) -> bool:
        """Whether all servers receive streams."""
        return all(receiver.is_streamed for receiver in self.receivers)


@dataclass
class StageResult:
    """What one stage sent."""

    sums: Checksums = field(default_factory=dict)
    """``sum64`` of each tensor of the stage, also of those that were not sent because they have not changed."""
    hashes: Checksums = field(default_factory=dict)
    """SHA-256 of each tensor, if the servers do not know ``sum64``."""
    num_bytes: int = 0
    """Bytes that were sent."""
    failed: dict[str, RolloutError] = field(default_factory=dict)


class StageSender:
    """Sends one stage's tensors; use it from one event loop.

    Args:
        server_of: the clients of servers.
        backend: backend of groups.
        device: device from which groups broadcast.
        timeout_seconds: limit for servers to join a group, and for a bucket to arrive.
        index: index of the stage.
    """

    def __init__(
        self,
        server_of: ServerClients,
        backend: Backend,
        device: torch.device,
        timeout_seconds: float,
        index: int = 0,
    ) -> None:
        self._server_of, self._device, self._index = server_of, device, index
        self._group = KeptGroup(backend, device, timeout_seconds)
        self._group_lock = asyncio.Lock()
        self._plan = StagePlan(0, (), None)
        self._servers: dict[str, WeightServer] = {}
        self._sent_sums: tuple[int | None, Mapping[str, str]] = None, {}
        """The version of the newest push, and its checksums."""
        self._number = 0
        self.result = StageResult()

    def begin(self, plan: StagePlan) -> None:
        """Begin a push."""
        if self.result.sums:
            self._sent_sums = self._plan.version, {name: value for name, (value, _) in self.result.sums.items()}
        self._plan, self.result, self._number = plan, StageResult(), 0
        self._servers = {receiver.url: self._server_of(receiver.url) for receiver in plan.receivers}

    async def send(self, bucket: NamedTensors) -> None:
        """Send a bucket to every server and empty it if it is a list; servers that fail are in the result."""
        changed = await asyncio.to_thread(self._changed, bucket)
        flat = await asyncio.to_thread(FlatBucket.of, changed, self._data_device)
        del changed
        if isinstance(bucket, list):
            bucket.clear()
        if not flat.headers or not self._servers:
            return
        self.result.num_bytes += flat.data.numel()
        if self._plan.is_streamed:
            await self._stream(flat)
        else:
            async with self._group_lock:
                receivers = [receiver for receiver in self._plan.receivers if receiver.url in self._servers]
                self._fail(await self._group.send(flat, receivers, self._servers))

    async def close(self) -> None:
        """Leave the group, and close the connections to the servers."""
        await self._group.close(self._server_of)
        await self._server_of.close()

    @property
    def _data_device(self) -> torch.device:
        return torch.device("cpu") if self._plan.is_streamed else self._device

    def _changed(self, bucket: NamedTensors) -> list[tuple[str, Tensor]]:
        """Record the checksums of the tensors; return those that the servers do not have already."""
        sums = sums64(dict(bucket))
        self.result.sums |= {name: (value, value) for name, value in sums.items()}
        if not self._plan.is_streamed and self._device.type == "cpu":
            self.result.hashes |= {name: padded_sha256(tensor) for name, tensor in bucket}
        version, sent = self._sent_sums
        if version is None or self._plan.base != version:
            return list(bucket)
        return [(name, tensor) for name, tensor in bucket if sent.get(name) != sums[name]]

    async def _stream(self, bucket: FlatBucket) -> None:
        """Stream a bucket through the chain of servers, and again to those that it did not reach."""
        urls = list(self._servers)
        start = (self._number + 2 * self._index) % len(urls)  # stages that send at the same time start apart
        self._number += 1
        missed = urls[start:] + urls[:start]
        while missed:
            first, *chain = missed
            results = await self._server_of(first).update_from_stream(bucket, chain)
            self._fail({url: result.error for url, result in results.items() if result.error is not None})
            missed = [url for url in chain if results[url].is_missed]

    def _fail(self, failed: Mapping[str, RolloutError]) -> None:
        for url, error in failed.items():
            self._servers.pop(url, None)
            self.result.failed.setdefault(url, error)


def merge_results(results: Iterable[StageResult]) -> StageResult:
    """Return the results of all stages as one."""
    merged = StageResult()
    for result in results:
        merged = replace(
            merged,
            sums=merged.sums | result.sums,
            hashes=merged.hashes | result.hashes,
            num_bytes=merged.num_bytes + result.num_bytes,
            failed=result.failed | merged.failed,
        )
    return merged
