"""MXFP4 weights: blocks of 32 four-bit floats that share a power-of-two scale, the format of gpt-oss's checkpoints.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0. An element is E2M1 (1 sign
bit, 2 exponent bits with bias 1, 1 mantissa bit); a scale is E8M0 (2^(value - 127); 255 is NaN). A checkpoint stores
``X`` as ``X_blocks`` (16 bytes per block, the first of two elements in the low half of a byte) and ``X_scales``. A row
of blocks is a column of ``X``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.models.quantized_format import Layout

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
BLOCK, BLOCK_BYTES = 32, 16
EXPONENT_BIAS, NAN_SCALE = 127, 255
MAX_MAGNITUDE = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
"""Value of each of the 16 bit patterns."""


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bytes [..., n / 32, 16], scales [..., n / 32]), both uint8, of finite values [..., n].

    The scale is the smallest power of two with which the block's largest magnitude is at most 6; elements are rounded
    to the nearest value, ties to even: torchao's ``to_mx`` with ``ScaleCalculationMode.RCEIL``.
    """
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    # frexp: largest / 6 = mantissa * 2^exponent with mantissa in [0.5, 1)
    mantissa, exponent = torch.frexp(largest / MAX_MAGNITUDE)
    exponent = exponent - (mantissa == 0.5).int()
    smallest = torch.where(largest > 0, exponent, -EXPONENT_BIAS).clamp(min=-EXPONENT_BIAS)
    scaled = torch.ldexp(blocks.double(), -smallest[..., None])
    magnitudes = scaled.abs()
    # Ties go to the even pattern: bounds of patterns 1, 3, 5, 7 are exclusive.
    patterns = torch.zeros(scaled.shape, dtype=torch.uint8, device=values.device)
    for pattern in range(1, len(_MAGNITUDES)):
        bound = (_MAGNITUDES[pattern - 1] + _MAGNITUDES[pattern]) / 2
        patterns += (magnitudes > bound) if pattern % 2 else (magnitudes >= bound)
    patterns |= torch.signbit(blocks).to(torch.uint8) << 3
    pairs = patterns.unflatten(-1, (BLOCK_BYTES, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, (smallest + EXPONENT_BIAS).to(torch.uint8)


@dataclass(frozen=True)
class MXFP4Format:
    """MXFP4 as a ``QuantizedFormat``."""

    values_suffix: str = BLOCKS_SUFFIX
    scales_suffix: str = SCALES_SUFFIX
    keeps_scales: bool = False

    @property
    def label(self) -> str:
        """The format in words."""
        return "MXFP4"

    def with_scale_dtype(self, dtype: torch.dtype) -> "MXFP4Format":
        """Return the format itself: its scales are always bytes."""
        return self

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of ``X``, [..., rows, columns], given that of its blocks, [..., columns, rows / 32, 16]."""
        *outer, columns, blocks, _ = stored
        return (*outer, blocks * BLOCK, columns)

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the shape is not one of blocks."""
        return stored[:-1] if len(stored) >= 3 and stored[-1] == BLOCK_BYTES else None

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the blocks' and the scales' shapes and dtypes; None if the rows are not whole blocks."""
        if len(shape) < 2 or shape[-2] % BLOCK:
            return None
        *outer, rows, columns = shape
        scales = (*outer, columns, rows // BLOCK)
        return {BLOCKS_SUFFIX: ((*scales, BLOCK_BYTES), torch.uint8), SCALES_SUFFIX: (scales, torch.uint8)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the blocks and the scales of ``X`` [..., rows, columns]."""
        blocks, scales = quantize_blocks(weight.transpose(-1, -2).contiguous())
        return {BLOCKS_SUFFIX: blocks, SCALES_SUFFIX: scales}

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return ``X`` in bfloat16, which represents every MXFP4 value exactly: [..., rows, columns]."""
        elements = E2M1_VALUES.to(values.device)[torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).int()]
        powers = torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - EXPONENT_BIAS)
        powers = torch.where(scales == NAN_SCALE, torch.nan, powers)
        return (elements * powers[..., None]).flatten(-2).to(torch.bfloat16).transpose(-1, -2).contiguous()
