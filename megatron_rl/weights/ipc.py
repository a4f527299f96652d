"""Weights through memory that the trainer and servers of the same machine share: of the CPU, or of one GPU (CUDA IPC).

    same machine? -> begin_weight_update (awaited) -> for each filling of the buffer:
    written, settled | update_weights_from_handle: every server copies it and answers -> end_weight_update

There is one buffer, of ``bucket_bytes``. Servers open it at the first filling and let it go at the end of the update,
or when this process ends. A tensor that is larger goes in pieces. Only the embedded server takes weights this way.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.checksum import SUM64, sums64
from megatron_rl.weights.shared_memory import Handle, Place, Shared, TensorPiece, common_device
from megatron_rl.weights.transport import NamedTensors, Server, WeightTransport, WeightUpdate

_ALIGN_BYTES = 64


@dataclass
class IpcTransport(WeightTransport):
    """Copies buckets into a buffer that the servers have open."""

    bucket_bytes: int
    device: torch.device
    """Where the trainer's weights are."""
    kept: Shared | None = None
    """The buffer on a GPU: torch gives such memory back only when every reader has said that it let go, and one that
    was killed says nothing."""

    async def begin(self, servers: Sequence[Server], version: int) -> WeightUpdate:
        """Open a push to those of the servers that run on this machine."""
        push = _IpcUpdate(list(servers), version, carrier=self)
        await push.each(push.meet)
        await push.each(lambda server: server.begin_update())
        push.open_buffer()
        return push

    def buffer(self, device: torch.device) -> Shared:
        """Return the buffer of a push."""
        if device.type != "cuda":
            return Shared(self.bucket_bytes, device)
        self.kept = self.kept or Shared(self.bucket_bytes, device)
        return self.kept

    def _sent(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(dtype).contiguous()


@dataclass
class _IpcUpdate(WeightUpdate):
    algorithm: ClassVar[str] = SUM64
    carrier: IpcTransport = field(kw_only=True)
    places: dict[str, Place] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    buffer: Shared | None = None

    async def meet(self, server: Server) -> None:
        """Refuse a server with which no memory can be shared."""
        place = await server.place()
        why = "it does not take weights this way, only the embedded server does" if place is None else None
        why = why or (place and Place.here().apart(place))
        if why or place is None:
            raise RolloutError(
                f"{server.url} cannot share memory with the trainer (weights.carrier = ipc): {why};"
                " write tensor, disk, distributed or auto"
            )
        self.places[server.url] = place

    def open_buffer(self) -> None:
        """Make the buffer, on the trainer's device if all servers see it."""
        places = [self.places[server.url] for server in self.servers]
        self.buffer = self.carrier.buffer(common_device(self.carrier.device, places))
        self.handles = {server.url: self.buffer.handle() for server in self.servers}

    def _sums(self, bucket: NamedTensors) -> dict[str, tuple[str, str]]:
        return {name: (value, value) for name, value in sums64(dict(bucket)).items()}

    async def _carry(self, bucket: NamedTensors) -> None:
        assert self.buffer is not None
        fillings = _fillings(bucket, self.buffer)
        while self.servers and (pieces := await asyncio.to_thread(next, fillings, None)):
            await self.each(lambda server, pieces=pieces: server.update_from_handle(self.handles[server.url], pieces))

    async def _end(self) -> None:
        try:
            await self.each(lambda server: server.end_update())
        finally:
            if self.buffer is not None and self.buffer is not self.carrier.kept:
                self.buffer.close()


def _fillings(bucket: NamedTensors, buffer: Shared) -> Iterator[list[TensorPiece]]:
    """Write as much as fits, yield what and where; go on when all have copied it."""
    room, used = buffer.memory_N.numel(), 0
    pieces: list[TensorPiece] = []
    for name, tensor in bucket:
        bytes_N, start = tensor.view(-1).view(torch.uint8), 0
        while start < bytes_N.numel():
            if room - used < min(_ALIGN_BYTES, bytes_N.numel() - start):
                buffer.settle()
                yield pieces
                used = 0
                pieces = list[TensorPiece]()
            count = min(bytes_N.numel() - start, (room - used) // _ALIGN_BYTES * _ALIGN_BYTES or room - used)
            buffer.memory_N[used : used + count].copy_(bytes_N[start : start + count])
            dtype = str(tensor.dtype).removeprefix("torch.")
            pieces.append(TensorPiece(name, dtype, tuple(tensor.shape), start, count, used))
            start, used = start + count, -(-(used + count) // _ALIGN_BYTES) * _ALIGN_BYTES
    if pieces:
        buffer.settle()
        yield pieces
