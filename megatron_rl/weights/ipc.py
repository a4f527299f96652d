"""Weights through memory that the trainer and servers of the same machine share: CPU memory, or one GPU's (CUDA IPC).

    same machine? -> begin_weight_update (awaited) -> for each fill of the buffer:
    written, synchronized | update_weights_from_handle: every server copies the slices and answers -> end_weight_update

There is one buffer of ``bucket_bytes``. Servers open it at the first fill and close it at the end of the update, or
when this process ends. A tensor larger than the buffer is sent in slices. Only the embedded server supports this
transport.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.checksum import SUM64, sums64
from megatron_rl.weights.shared_memory import Handle, MemoryLocation, SharedBuffer, TensorSlice, common_device
from megatron_rl.weights.transport import (
    Checksums,
    NamedTensors,
    WeightServer,
    WeightTransport,
    WeightUpdate,
    converted,
)

_ALIGN_BYTES = 64


@dataclass
class IpcTransport(WeightTransport):
    """Copies buckets to a buffer that the servers have opened."""

    bucket_bytes: int
    device: torch.device
    """Device of the trainer's weights."""
    gpu_buffer: SharedBuffer | None = None
    """The buffer on a GPU, reused by every update: torch frees such memory only after every reader has released it, and
    a reader that was killed never does."""

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update of those servers that run on this machine."""
        update = _IpcUpdate(list(servers), version, transport=self)
        await update.for_each_server(update.locate)
        await update.for_each_server(lambda server: server.begin_update())
        update.open_buffer()
        return update

    def buffer(self, device: torch.device) -> SharedBuffer:
        """Return the buffer of an update."""
        if device.type != "cuda":
            return SharedBuffer(self.bucket_bytes, device)
        self.gpu_buffer = self.gpu_buffer or SharedBuffer(self.bucket_bytes, device)
        return self.gpu_buffer

    def _converted(self, tensor: Tensor) -> Tensor:
        return converted(tensor, self.dtype)


@dataclass
class _IpcUpdate(WeightUpdate):
    algorithm: ClassVar[str] = SUM64
    transport: IpcTransport = field(kw_only=True)
    locations: dict[str, MemoryLocation] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    buffer: SharedBuffer | None = None

    async def locate(self, server: WeightServer) -> None:
        """Refuse a server that cannot share memory with this process."""
        location = await server.memory_location()
        reason = "only the embedded server receives weights this way" if location is None else None
        reason = reason or (location and MemoryLocation.current().obstacle(location))
        if reason or location is None:
            raise RolloutError(
                f"{server.url} cannot share memory with the trainer (weights.carrier = ipc): {reason};"
                " write tensor, disk, distributed or auto"
            )
        self.locations[server.url] = location

    def open_buffer(self) -> None:
        """Open the buffer, on the trainer's device if all servers see it."""
        locations = [self.locations[server.url] for server in self.servers]
        self.buffer = self.transport.buffer(common_device(self.transport.device, locations))
        self.handles = {server.url: self.buffer.handle() for server in self.servers}

    def _checksums(self, bucket: NamedTensors) -> Checksums:
        return {name: (value, value) for name, value in sums64(dict(bucket)).items()}

    async def _send(self, bucket: NamedTensors) -> None:
        assert self.buffer is not None
        fills = _fills(bucket, self.buffer)
        while self.servers and (slices := await asyncio.to_thread(next, fills, None)):
            await self.for_each_server(
                lambda server, slices=slices: server.update_from_handle(self.handles[server.url], slices)
            )

    async def _apply(self) -> None:
        try:
            await self.for_each_server(lambda server: server.end_update())
        finally:
            if self.buffer is not None and self.buffer is not self.transport.gpu_buffer:
                self.buffer.close()


def _fills(bucket: NamedTensors, buffer: SharedBuffer) -> Iterator[list[TensorSlice]]:
    """Fill the buffer and yield its slices, again and again; continue after all servers have copied them."""
    room, used = buffer.memory.numel(), 0
    slices: list[TensorSlice] = []
    for name, tensor in bucket:
        data, start = tensor.view(-1).view(torch.uint8), 0
        while start < data.numel():
            if room - used < min(_ALIGN_BYTES, data.numel() - start):
                buffer.synchronize()
                yield slices
                used = 0
                slices = list[TensorSlice]()
            count = min(data.numel() - start, (room - used) // _ALIGN_BYTES * _ALIGN_BYTES or room - used)
            buffer.memory[used : used + count].copy_(data[start : start + count])
            dtype = str(tensor.dtype).removeprefix("torch.")
            slices.append(TensorSlice(name, dtype, tuple(tensor.shape), start, count, used))
            start, used = start + count, -(-(used + count) // _ALIGN_BYTES) * _ALIGN_BYTES
    if slices:
        buffer.synchronize()
        yield slices
