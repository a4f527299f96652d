"""Buckets as one array of bytes: the tensors one after the other, without gaps, as SGLang's ``flattened_bucket``."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorHeader:
    """Metadata of a tensor, sent before its data."""

    name: str
    dtype: str
    """Name of the torch type, such as ``bfloat16``."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "TensorHeader":
        """Return the metadata of a tensor."""
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class FlatBucket:
    """Tensors, and their bytes in one array, uint8 [bytes]."""

    headers: Sequence[TensorHeader]
    data: Tensor

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, Tensor]], device: torch.device) -> "FlatBucket":
        """Copy tensors to one array on a device."""
        headers = [TensorHeader.of(name, tensor) for name, tensor in tensors]
        data = torch.empty(sum(header.num_bytes for header in headers), dtype=torch.uint8, device=device)
        sizes = [header.num_bytes for header in headers]
        for (_, tensor), part in zip(tensors, data.split(sizes), strict=True):
            part.copy_(tensor.detach().reshape(-1).view(torch.uint8))
        return cls(headers, data)

    @classmethod
    def empty(cls, headers: Sequence[TensorHeader], device: torch.device) -> "FlatBucket":
        """Return a bucket with room for these tensors."""
        size = sum(header.num_bytes for header in headers)
        return cls(headers, torch.empty(size, dtype=torch.uint8, device=device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors: views of the array, or copies where a type needs another alignment."""
        start = 0
        for header in self.headers:
            part = self.data[start : start + header.num_bytes]
            aligned = part if start % header.torch_dtype.itemsize == 0 else part.clone()
            yield header.name, aligned.view(header.torch_dtype).view(header.shape)
            start += header.num_bytes
