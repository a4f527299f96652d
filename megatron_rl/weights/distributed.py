"""Weights through torch.distributed: a group of the sender and one server each, gloo or NCCL.

    begin_weight_update (awaited) -> init_weights_update_group | both sides join (awaited)
    -> for each bucket: update_weights_from_distributed | broadcast of its tensors -> end_weight_update -> destroy

A server reads the broadcast while its answer is outstanding, so a bucket waits for both and gives the group up as soon
as the answer is a refusal: nothing hangs. Every server has a group of its own, so one that dies or hangs takes no
other with it; the price is that a bucket leaves the sender once for each server.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.transport import NamedTensors, Server, TensorHeader, WeightTransport, WeightUpdate
from megatron_rl.weights.weight_group import Backend, Meeting, Pair, in_thread

_LONGEST_NAP_SECONDS = 0.02


@dataclass
class DistributedTransport(WeightTransport):
    """Broadcasts buckets from this process's device."""

    bucket_bytes: int
    backend: Backend
    device: torch.device
    timeout_seconds: float = 120.0
    """For a server to join, and for a bucket to arrive."""

    async def begin(self, servers: Sequence[Server], version: int) -> WeightUpdate:
        """Open a push: on each server first the update, then the group."""
        push = _DistributedUpdate(list(servers), version, carrier=self)
        await push.each(lambda server: server.begin_update())
        await push.each(push.connect)
        return push


@dataclass
class _DistributedUpdate(WeightUpdate):
    carrier: DistributedTransport = field(kw_only=True)
    pairs: dict[str, Pair] = field(default_factory=dict)
    group: str = field(default_factory=lambda: f"megatron-rl-{uuid.uuid4().hex}")

    async def connect(self, server: Server) -> None:
        """Meet one server."""
        store = Meeting.listening(urlsplit(server.url).hostname or "", self.carrier.timeout_seconds)
        size, backend = 1 + await server.tensor_parallel(), self.carrier.backend
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Pair | BaseException] = loop.create_future()

        def deliver(result: Pair | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: opened.done() or opened.set_result(result))

        in_thread(lambda: Pair.open(store, self.group, 0, size, backend), deliver)
        await server.join_group(store.host, store.port, size, self.group, backend)
        result = await opened
        if isinstance(result, BaseException):
            raise RolloutError(f"{server.url} did not join the group for weights: {result}") from result
        self.pairs[server.url] = result

    async def _carry(self, bucket: NamedTensors) -> None:
        header = [TensorHeader(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in bucket]
        tensors = [tensor.to(self.carrier.device) for _, tensor in bucket]
        await self.each(lambda server: self._broadcast(server, header, tensors))

    async def _broadcast(self, server: Server, header: Sequence[TensorHeader], tensors: Sequence[Tensor]) -> None:
        answer = asyncio.ensure_future(server.update_from_distributed(header, self.group))
        works = self.pairs[server.url].broadcast(tensors)
        nap = 0.001
        try:
            while not answer.done() and not all(work.is_completed() for work in works):
                await asyncio.wait([answer], timeout=nap)
                nap = min(2 * nap, _LONGEST_NAP_SECONDS)
            await answer
        except RolloutError:
            self.pairs.pop(server.url).close()
            raise

    async def _end(self) -> None:
        await self.each(lambda server: server.end_update())
        await self.each(lambda server: server.leave_group(self.group))
        for pair in self.pairs.values():
            pair.close()
