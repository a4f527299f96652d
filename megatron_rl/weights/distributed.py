"""Weights through torch.distributed: one group per server, of the sender and the server's ranks; gloo or NCCL.

    begin_weight_update (awaited) -> init_weights_update_group | both sides join (awaited)
    -> for each bucket: update_weights_from_distributed | broadcast of its tensors -> end_weight_update -> destroy

A server receives the broadcast before it answers the HTTP request, so a bucket waits for both and abandons the group as
soon as the answer is an error: nothing hangs. With one group per server, a server that dies or hangs does not affect
the others; the price is that the sender sends each bucket once per server.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.transport import NamedTensors, TensorHeader, WeightServer, WeightTransport, WeightUpdate
from megatron_rl.weights.weight_group import Backend, Rendezvous, WeightGroup, run_in_thread

_MAX_POLL_SECONDS = 0.02


@dataclass
class DistributedTransport(WeightTransport):
    """Broadcasts buckets from this process's device."""

    bucket_bytes: int
    backend: Backend
    device: torch.device
    timeout_seconds: float = 120.0
    """Limit for a server to join, and for a bucket to arrive."""

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update: on each server first the update, then the group."""
        update = _DistributedUpdate(list(servers), version, transport=self)
        await update.for_each_server(lambda server: server.begin_update())
        await update.for_each_server(update.connect)
        return update


@dataclass
class _DistributedUpdate(WeightUpdate):
    transport: DistributedTransport = field(kw_only=True)
    groups: dict[str, WeightGroup] = field(default_factory=dict)
    group_name: str = field(default_factory=lambda: f"megatron-rl-{uuid.uuid4().hex}")

    async def connect(self, server: WeightServer) -> None:
        """Open the group with one server."""
        rendezvous = Rendezvous.listen(urlsplit(server.url).hostname or "", self.transport.timeout_seconds)
        size, backend = 1 + await server.tensor_parallel(), self.transport.backend
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[WeightGroup | BaseException] = loop.create_future()

        def deliver(result: WeightGroup | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: opened.done() or opened.set_result(result))

        run_in_thread(lambda: WeightGroup.open(rendezvous, self.group_name, 0, size, backend), deliver)
        await server.join_group(rendezvous.host, rendezvous.port, size, self.group_name, backend)
        result = await opened
        if isinstance(result, BaseException):
            raise RolloutError(f"{server.url} did not join the group for weights: {result}") from result
        self.groups[server.url] = result

    async def _send(self, bucket: NamedTensors) -> None:
        headers = [TensorHeader(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in bucket]
        tensors = [tensor.to(self.transport.device) for _, tensor in bucket]
        await self.for_each_server(lambda server: self._broadcast(server, headers, tensors))

    async def _broadcast(
        self, server: WeightServer, headers: Sequence[TensorHeader], tensors: Sequence[Tensor]
    ) -> None:
        answer = asyncio.ensure_future(server.update_from_distributed(headers, self.group_name))
        works = self.groups[server.url].broadcast(tensors)
        poll_seconds = 0.001
        try:
            while not answer.done() and not all(work.is_completed() for work in works):
                await asyncio.wait([answer], timeout=poll_seconds)
                poll_seconds = min(2 * poll_seconds, _MAX_POLL_SECONDS)
            await answer
        except RolloutError:
            self.groups.pop(server.url).close()
            raise

    async def _apply(self) -> None:
        await self.for_each_server(lambda server: server.end_update())
        await self.for_each_server(lambda server: server.leave_group(self.group_name))
        for group in self.groups.values():
            group.close()
