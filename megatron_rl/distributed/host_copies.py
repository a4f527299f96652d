"""Copies of tensors in host memory, so that they can be written while the originals change."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


class HostCopies:
    """Holds one copy of each tensor. The memory is kept for the next time: to get it anew takes longer than to copy."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[Key, Tensor]]) -> list[tuple[Key, Tensor]]:
        """Return copies on the CPU under the same keys; they are valid until the next call."""
        copies = []
        for number, (key, tensor) in enumerate(tensors):
            if number == len(self._buffers):
                self._buffers.append(torch.empty(0))
            if self._buffers[number].shape != tensor.shape or self._buffers[number].dtype is not tensor.dtype:
                on_device = tensor.device.type != "cpu"  # which copies to pinned memory at full speed
                self._buffers[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
            copies.append((key, self._buffers[number].copy_(tensor)))
        return copies
