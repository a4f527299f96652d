"""The interface of quantized formats: how a weight of the model is stored in a checkpoint or held by a server.

A format turns one tensor ``X`` into several, named ``X`` plus a suffix: the values, the scales, and what else its
readers expect.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Suffix -> shape and dtype of the stored tensor."""


class QuantizedFormat(Protocol):
    """Encodes tensors, and decodes them to bfloat16."""

    @property
    def label(self) -> str:
        """The format in words, for messages and tables."""
        ...

    @property
    def values_suffix(self) -> str:
        """Suffix that turns the name of a tensor into the name of its values."""
        ...

    @property
    def scales_suffix(self) -> str:
        """Suffix that turns the name of a tensor into the name of its scales."""
        ...

    @property
    def keeps_scales(self) -> bool:
        """Whether the scales are tensors of the checkpoint themselves, copied when it is converted."""
        ...

    def with_scale_dtype(self, dtype: torch.dtype) -> "QuantizedFormat":
        """Return the format with scales of this dtype, if it has a choice."""
        ...

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the decoded tensor, given the shape of the stored values."""
        ...

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the stored values have an invalid shape."""
        ...

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the tensors that ``encode`` makes of a tensor of this shape; None if it cannot encode that shape."""
        ...

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, on the tensor's device."""
        ...

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the tensor in bfloat16."""
        ...
