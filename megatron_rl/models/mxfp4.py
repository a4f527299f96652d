"""MXFP4 weights: blocks of 32 four-bit floats that share a power-of-two scale, the format of gpt-oss's checkpoints.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0. An element is E2M1 (1 sign
bit, 2 exponent bits with bias 1, 1 mantissa bit); a scale is E8M0 (2^(value - 127); 255 is NaN). A checkpoint stores
``X`` as ``X_blocks`` (16 bytes per block, the first of two elements in the low half of a byte) and ``X_scales``. A row
of blocks is a column of ``X``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
BLOCK, BLOCK_BYTES = 32, 16
EXPONENT_BIAS, NAN_SCALE = 127, 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
"""Value of each of the 16 bit patterns."""


@dataclass(frozen=True)
class MXFP4Format:
    """MXFP4 as a ``QuantizedFormat``."""

    scales_suffix: str = SCALES_SUFFIX
    keeps_scales: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of ``X``, [..., rows, columns], given that of its blocks, [..., columns, rows / 32, 16]."""
        *outer, columns, blocks, _ = stored
        return (*outer, blocks * BLOCK, columns)

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the shape is not one of blocks."""
        return stored[:-1] if len(stored) >= 3 and stored[-1] == BLOCK_BYTES else None

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return ``X`` in bfloat16, which represents every MXFP4 value exactly: [..., rows, columns]."""
        elements = E2M1_VALUES[torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).int()]
        powers = torch.ldexp(torch.ones(scales.shape), scales.int() - EXPONENT_BIAS)
        powers = torch.where(scales == NAN_SCALE, torch.nan, powers)
        return (elements * powers[..., None]).flatten(-2).to(torch.bfloat16).transpose(-1, -2).contiguous()
