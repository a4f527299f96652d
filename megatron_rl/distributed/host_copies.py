"""Copies tensors to host memory, so that they can be written to disk while the originals change."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class HostCopies:
    """Reusable host buffers, one per tensor. Allocating pinned memory takes longer than copying."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[Key, Tensor]]) -> list[tuple[Key, Tensor]]:
        """Return (key, copy on the CPU) pairs in the same order. The copies are valid until the next call."""
        copies = []
        for number, (key, tensor) in enumerate(tensors):
            if number == len(self._buffers):
                self._buffers.append(torch.empty(0))
            if self._buffers[number].shape != tensor.shape or self._buffers[number].dtype is not tensor.dtype:
                on_device = tensor.device.type != "cpu"  # pinned memory is copied to at full bandwidth
                self._buffers[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            copies.append((key, self._buffers[number].copy_(tensor)))
        return copies
