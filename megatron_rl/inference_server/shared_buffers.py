"""The embedded server's side of weights through shared memory: copies tensors out of the sender's buffer."""

import asyncio
import os
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.shared_memory import CannotShare, Handle, TensorPiece, open_shared, wait_for

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
_DTYPES["float16"] = torch.float16


class Filling(BaseModel):
    """The body of ``POST /update_weights_from_handle``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    handle: Handle
    pieces: Annotated[list[TensorPiece], Field(min_length=1)]
    weight_version: str | None = None


class SharedBuffer:
    """The sender's buffer, open from the first filling to the end of the update or of the sender."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._handle: Handle | None = None
        self._bytes_N: Tensor | None = None
        self._unfinished: dict[str, tuple[Tensor, int]] = {}
        """Tensors of which some pieces have come, and the bytes that are there."""
        self._sender: int | None = None

    def watch(self, handle: Handle) -> None:
        """Open the buffer, and let it go when its process ends; call it on the event loop."""
        if handle == self._handle:
            return
        self.close()
        try:
            self._sender = os.pidfd_open(handle.pid)
            self._bytes_N = open_shared(handle)
        except (CannotShare, ProcessLookupError) as error:
            self.close()
            raise BadRequest(f"the sender's memory: {error}") from error
        self._handle = handle
        asyncio.get_running_loop().add_reader(self._sender, self.close)

    def read(self, pieces: list[TensorPiece]) -> list[tuple[str, Tensor]]:
        """Return copies of the tensors that these pieces complete."""
        finished: list[tuple[str, Tensor]] = []
        shared_N = self._bytes_N  # which may be closed from the event loop meanwhile
        if shared_N is None:
            raise BadRequest("the sender of these weights has ended")
        for piece in pieces:
            tensor = self._add(piece, shared_N)
            if tensor is not None:
                finished.append((piece.name, tensor))
        wait_for(self.device)  # the sender writes again as soon as it has the answer
        return finished

    def _add(self, piece: TensorPiece, shared_N: Tensor) -> Tensor | None:
        """Copy a piece; return the tensor if this was its last one."""
        tensor, known = self._unfinished.pop(piece.name, (None, 0))
        tensor = self._room(piece) if tensor is None else tensor
        target_N = tensor.view(-1).view(torch.uint8)
        stop, end = piece.start + piece.num_bytes, piece.offset + piece.num_bytes
        if not (piece.start == known < stop <= target_N.numel() and 0 <= piece.offset < end <= shared_N.numel()):
            raise BadRequest(f"{piece}: it does not follow byte {known} of {target_N.numel()}, or is not in the buffer")
        target_N[piece.start : stop] = shared_N[piece.offset : end]
        if stop == target_N.numel():
            return tensor
        self._unfinished[piece.name] = tensor, stop
        return None

    def _room(self, piece: TensorPiece) -> Tensor:
        if piece.dtype not in _DTYPES or any(size < 0 for size in piece.shape):
            raise BadRequest(f"{piece.name} is {piece.dtype} {list(piece.shape)}; send one of {', '.join(_DTYPES)}")
        return torch.empty(piece.shape, dtype=_DTYPES[piece.dtype], device=self.device)

    def close(self) -> None:
        """Let the buffer go; more than once does no harm."""
        self._handle = self._bytes_N = None
        self._unfinished.clear()
        if self._sender is not None:
            asyncio.get_running_loop().remove_reader(self._sender)
            os.close(self._sender)
            self._sender = None


def filling_of(body: Mapping[str, object]) -> Filling:
    """Return the checked body of a request."""
    try:
        return Filling.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}, got {str(first['input'])[:60]!r}") from error
