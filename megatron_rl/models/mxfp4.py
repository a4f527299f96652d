"""MXFP4 weights: blocks of 32 four-bit numbers with a common power of two, as gpt-oss's published files have them.

After the Open Compute Project's "Microscaling Formats (MX) Specification", version 1.0: an element is E2M1 (a sign, two
bits of exponent with bias 1, one of mantissa), the scale E8M0 (two to the power of its value less 127; 255 is NaN). A
file has the blocks of ``X`` in ``X_blocks``, 16 bytes each, the first of two numbers in a byte's low half, and the
scales in ``X_scales``. A row of blocks is a column of ``X``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
BLOCK, BLOCK_BYTES = 32, 16
BIAS, NOT_A_NUMBER = 127, 255
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = torch.tensor([*_POSITIVE, *(-number for number in _POSITIVE)])
"""What each of the sixteen patterns means."""


@dataclass(frozen=True)
class MXFP4Format:
    """How such a tensor is read: see ``QuantizedFormat``."""

    scales_suffix: str = SCALES_SUFFIX
    keeps_scales: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of ``X`` from that of its blocks, [..., columns, rows / 32, 16]."""
        *outer, columns, blocks, _ = stored
        return (*outer, blocks * BLOCK, columns)

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that the scales must have; None: these are no blocks."""
        return stored[:-1] if len(stored) >= 3 and stored[-1] == BLOCK_BYTES else None

    def decoded(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return ``X`` in bfloat16, which holds every such number exactly: [..., rows, columns]."""
        numbers = NUMBERS[torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).int()]
        powers = torch.ldexp(torch.ones(scales.shape), scales.int() - BIAS)
        powers = torch.where(scales == NOT_A_NUMBER, torch.nan, powers)
        return (numbers * powers[..., None]).flatten(-2).to(torch.bfloat16).transpose(-1, -2).contiguous()
