"""FP8 weights with one float32 scale per block, the format of DeepSeek-V3's checkpoints (arXiv 2412.19437).

Block (i, j) of ``X.weight`` equals its ``float8_e4m3fn`` values times ``X.weight_scale_inv[i, j]``. Blocks at the
bottom and right edge may be smaller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of this shape."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return values [rows, columns] times the scale of their block, multiplied in float32, rounded to bfloat16."""
    return (values.float() * _expand(scales, values.shape, block)).bfloat16()


def quantize(weight: Tensor, block: tuple[int, int], old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (float8_e4m3fn values [rows, columns], float32 scales) of a matrix.

    The scale of a block maps its largest magnitude to 448, the maximum of float8_e4m3fn. Scales in ``old`` are reused
    for blocks whose values they can still represent, so that unchanged blocks are reproduced bit for bit.
    """
    rows, columns = scales_shape(tuple(weight.shape), block)
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    largest = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    if old is not None:
        # bfloat16 rounds by up to 2^-8. A block that has shrunk below half would waste the range of float8.
        reusable = (largest <= old * FP8_MAX * (1 + 2**-8)) & (largest > old * FP8_MAX / 2)
        scales = torch.where(reusable | (largest == 0), old, scales)
    values = weight.float() / _expand(scales, weight.shape, block)
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def _expand(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Return the scale of every element, [rows, columns]."""
    rows = scales.float().repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


@dataclass(frozen=True)
class FP8Format:
    """Block FP8 as a ``QuantizedFormat``.

    Attributes:
        block: (rows, columns) per scale.
    """

    block: tuple[int, int]
    scales_suffix: str = SCALE_SUFFIX
    keeps_scales: bool = True

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix, given that of its values; they are equal."""
        return stored

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the values are not a matrix."""
        return scales_shape(stored, self.block) if len(stored) == 2 else None

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix in bfloat16."""
        return dequantize(values, scales, self.block)
