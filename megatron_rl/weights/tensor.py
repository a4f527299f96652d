"""Weights in the bodies of HTTP requests: works between any two machines, without shared memory or a shared disk."""

import asyncio
import base64
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.weights.transport import NamedTensors, WeightServer, WeightTransport, WeightUpdate

STORAGE_BYTES = 1 << 20
"""Small tensors share storages of this size: each storage takes a third of a millisecond to write and to read."""


@dataclass
class TensorTransport(WeightTransport):
    """Sends base64 pickles of ``[(name, tensor)]``.

    They are plain pickles because torch's ForkingPickler with shared file descriptors crashes an SGLang server.
    """

    bucket_bytes: int

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update; SGLang refuses tensors before that."""
        update = _TensorUpdate(list(servers), version)
        await update.for_each_server(lambda server: server.begin_update())
        return update


class _TensorUpdate(WeightUpdate):
    async def _send(self, bucket: NamedTensors) -> None:
        payload = await asyncio.to_thread(encode, bucket)
        await self.for_each_server(lambda server: server.update_from_tensor(payload))

    async def _apply(self) -> None:
        await self.for_each_server(lambda server: server.end_update())


def encode(bucket: NamedTensors) -> str:
    """Return the tensors as SGLang's ``update_weights_from_tensor`` takes them."""
    # Importing megatron-core 0.17 or later replaces this function by one whose name no server knows.
    loader = torch.storage._load_from_bytes
    loader.__module__, loader.__name__, loader.__qualname__ = "torch.storage", "_load_from_bytes", "_load_from_bytes"
    file = io.BytesIO()
    _Pickler(file, [tensor for _, tensor in bucket]).dump(list(bucket))
    return base64.b64encode(file.getbuffer()).decode("ascii")


class _Pickler(pickle.Pickler):
    """Writes tensors as torch does, but puts small neighbors into one storage, which pickle then writes once."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._storages = {
            id(tensor): (storage, start) for run in _runs(tensors) for tensor, storage, start in _merged(run)
        }

    def reducer_override(self, value: object, /) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
        """Return the function and arguments that rebuild a tensor; other values are left to pickle."""
        if not isinstance(value, Tensor):
            return NotImplemented
        storage, start = self._storages[id(value)]
        strides = torch.empty(value.shape, device="meta").stride()
        hooks: OrderedDict[str, object] = OrderedDict()
        if _is_byte_float(value):
            parts = storage, start, tuple(value.shape), strides, False, hooks, value.dtype
            return torch._utils._rebuild_tensor_v3, parts
        return torch._utils._rebuild_tensor_v2, (storage, start, tuple(value.shape), strides, False, hooks)


def _runs(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of neighbors of one type that fit into a storage; a larger tensor is a run of its own."""
    run: list[Tensor] = []
    for tensor in tensors:
        if run and (run[0].dtype != tensor.dtype or sum(t.nbytes for t in run) + tensor.nbytes > STORAGE_BYTES):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _merged(run: Sequence[Tensor]) -> Iterator[tuple[Tensor, torch.TypedStorage, int]]:
    """Copy a run into one storage; yield each tensor with the storage and its start there."""
    flat, start = torch.cat([tensor.flatten() for tensor in run]), 0
    storage = (flat.view(torch.uint8) if _is_byte_float(flat) else flat)._typed_storage()
    for tensor in run:
        yield tensor, storage, start
        start += tensor.numel()


def _is_byte_float(tensor: Tensor) -> bool:
    """Return whether a tensor has floats of one byte, of which torch can write no storage."""
    return tensor.dtype.itemsize == 1 and tensor.is_floating_point()
