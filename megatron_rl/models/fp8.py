"""FP8 weights with one float32 scale for each block, as DeepSeek-V3's checkpoints have them.

Block (i, j) of ``X.weight`` is ``float8_e4m3fn`` values times ``X.weight_scale_inv[i, j]``. Blocks at the
lower and right edge may be smaller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return values [rows, columns] times the scale of their block, multiplied in float32 and rounded once."""
    return (values.float() * _spread(scales, values.shape, block)).to(dtype)


def quantize(weight: Tensor, block: tuple[int, int], old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (float8 values, float32 scales) of a matrix.

    A block's scale makes its largest value float8's largest, 448. Where the scales that the matrix once came with are
    given and still hold its values, they stay: a block that has not changed then comes out as it was, bit for bit.
    """
    rows, columns = scales_shape(tuple(weight.shape), block)
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    largest = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    if old is not None:
        # bfloat16 rounds by up to 2^-8; and a block that has shrunk to half would waste float8's range
        holds = (largest <= old * LARGEST * (1 + 2**-8)) & (largest > old * LARGEST / 2)
        scales = torch.where(holds | (largest == 0), old, scales)
    values = weight.float() / _spread(scales, weight.shape, block)
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def _spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Return the scale of each element."""
    rows = scales.float().repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


@dataclass(frozen=True)
class FP8Format:
    """How such a matrix is read: see ``QuantizedFormat``."""

    block: tuple[int, int]
    scales_suffix: str = SCALE_SUFFIX
    keeps_scales: bool = True

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix, which is that of its values."""
        return stored

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that the scales must have; None: this is no matrix."""
        return scales_shape(stored, self.block) if len(stored) == 2 else None

    def decoded(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix in bfloat16."""
        return dequantize(values, scales, self.block)
