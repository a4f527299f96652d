"""The receiving side of weights through shared memory: copies tensors out of the sender's buffer."""

import asyncio
import math
import os
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.dtypes import DTYPES
from megatron_rl.weights.shared_memory import CannotShare, Handle, TensorSlice, open_shared, synchronize


class UpdateFromHandleBody(BaseModel):
    """The body of ``POST /update_weights_from_handle``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    handle: Handle
    slices: Annotated[list[TensorSlice], Field(min_length=1)]
    weight_version: str | None = None


class SharedBufferReader:
    """The sender's buffer, open from the first fill to the end of the update or of the sender's process."""

    def __init__(self, device: torch.device, max_elements: int) -> None:
        """Open no buffer yet.

        Args:
            device: where tensors are copied to.
            max_elements: number of elements of the model's largest tensor; larger ones are refused.
        """
        self.device, self.max_tensor_bytes = device, max_elements * torch.float64.itemsize
        self._handle: Handle | None = None
        self._memory: Tensor | None = None
        self._incomplete: dict[str, tuple[Tensor, int]] = {}
        """Tensors of which some slices have arrived, and the number of bytes that arrived."""
        self._sender: int | None = None
        """File descriptor of the sender's process."""

    def open(self, handle: Handle) -> None:
        """Open the buffer, and close it when the sender's process ends; call this on the event loop."""
        if handle == self._handle:
            return
        self.close()
        try:
            self._sender = os.pidfd_open(handle.pid)
            self._memory = open_shared(handle)
        except (CannotShare, ProcessLookupError) as error:
            self.close()
            raise BadRequest(f"the sender's memory: {error}") from error
        self._handle = handle
        asyncio.get_running_loop().add_reader(self._sender, self.close)

    def read(self, slices: list[TensorSlice]) -> list[tuple[str, Tensor]]:
        """Return copies of the tensors that these slices complete."""
        complete: list[tuple[str, Tensor]] = []
        memory = self._memory  # the event loop may close it meanwhile
        if memory is None:
            raise BadRequest("the sender of these weights has ended")
        for entry in slices:
            tensor = self._add(entry, memory)
            if tensor is not None:
                complete.append((entry.name, tensor))
        synchronize(self.device)  # the sender writes again as soon as it has the answer
        return complete

    def _add(self, entry: TensorSlice, memory: Tensor) -> Tensor | None:
        """Copy a slice; return the tensor if this was its last one."""
        tensor, known = self._incomplete.pop(entry.name, (None, 0))
        tensor = self._empty(entry) if tensor is None else tensor
        data = tensor.view(-1).view(torch.uint8)
        stop, end = entry.start + entry.num_bytes, entry.offset + entry.num_bytes
        if not (entry.start == known < stop <= data.numel() and 0 <= entry.offset < end <= memory.numel()):
            raise BadRequest(f"{entry}: it does not follow byte {known} of {data.numel()}, or is not in the buffer")
        data[entry.start : stop] = memory[entry.offset : end]
        if stop == data.numel():
            return tensor
        self._incomplete[entry.name] = tensor, stop
        return None

    def _empty(self, entry: TensorSlice) -> Tensor:
        if entry.dtype not in DTYPES or any(size < 0 for size in entry.shape):
            raise BadRequest(f"{entry.name} is {entry.dtype} {list(entry.shape)}; send one of {', '.join(DTYPES)}")
        num_bytes = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if num_bytes > self.max_tensor_bytes:
            raise BadRequest(
                f"{entry.name} is {list(entry.shape)}, {num_bytes} bytes; no tensor of this model is as large"
            )
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=self.device)

    def close(self) -> None:
        """Close the buffer; closing it again has no effect."""
        self._handle = self._memory = None
        self._incomplete.clear()
        if self._sender is not None:
            asyncio.get_running_loop().remove_reader(self._sender)
            os.close(self._sender)
            self._sender = None
