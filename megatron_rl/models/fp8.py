"""FP8 weights with one scale per block, the format of DeepSeek-V3's checkpoints (arXiv 2412.19437).

Scales are float32, or powers of two (ue8m0). Block (i, j) of ``X.weight`` equals its ``float8_e4m3fn`` values times
``X.weight_scale_inv[i, j]``. Blocks at the bottom and right edge may be smaller.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.models.quantized_format import Layout

SCALE_SUFFIX = "_scale_inv"
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix of this shape."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return values [rows, columns] times the scale of their block, multiplied in float32, rounded to bfloat16."""
    return (values.float() * _expand(scales, values.shape, block)).bfloat16()


def quantize(
    weight: Tensor, block: tuple[int, int], old: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (float8_e4m3fn values [rows, columns], float32 scales) of a matrix, on its device.

    The scale of a block maps its largest magnitude to 448, the maximum of float8_e4m3fn; with ``power_of_two`` it is
    rounded up to a power of two. Scales in ``old`` are reused for blocks whose values they can still represent, so that
    unchanged blocks are reproduced bit for bit. Without ``old`` the bytes are those of transformers' ``Fp8Quantize``.
    """
    rows, columns = scales_shape(tuple(weight.shape), block)
    padded = torch.zeros(rows * block[0], columns * block[1], device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    factors = torch.where(largest > 0, FP8_MAX / largest, 1.0)
    scales = 1.0 / factors
    if power_of_two:
        scales = torch.pow(2.0, torch.ceil(torch.log2(scales.clamp(min=torch.finfo(torch.float32).tiny))))
        factors = 1.0 / scales
    if old is not None:
        # bfloat16 rounds by up to 2^-8. A block that has shrunk below half would waste the range of float8.
        old = old.float()
        reusable = (largest <= old * FP8_MAX * (1 + 2**-8)) & (largest > old * FP8_MAX / 2) | (largest == 0)
        scales, factors = torch.where(reusable, old, scales), torch.where(reusable, 1.0 / old, factors)
    values = weight.float() * _expand(factors, weight.shape, block)
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
        power_of_two: scales are powers of two (``scale_fmt`` is ``ue8m0``).
        scale_dtype: dtype of the stored scales: float32, or float8_e8m0fnu, which holds powers of two exactly.
    """

    block: tuple[int, int]
    power_of_two: bool = False
    scale_dtype: torch.dtype = torch.float32
    values_suffix: str = ""
    scales_suffix: str = SCALE_SUFFIX
    keeps_scales: bool = True

    @property
    def label(self) -> str:
        """The format in words."""
        scales = "ue8m0" if self.power_of_two else "float32"
        return f"FP8 in blocks of {self.block[0]} x {self.block[1]} with {scales} scales"

    def with_scale_dtype(self, dtype: torch.dtype) -> "FP8Format":
        """Return the format with scales of this dtype."""
        return replace(self, scale_dtype=dtype)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix, given that of its values; they are equal."""
        return stored

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the values are not a matrix."""
        return scales_shape(stored, self.block) if len(stored) == 2 else None

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the values' and the scales' shapes and dtypes; None if the tensor is not a matrix."""
        if len(shape) != 2:
            return None
        scales = scales_shape(shape, self.block), self.scale_dtype
        return {"": (shape, torch.float8_e4m3fn), SCALE_SUFFIX: scales}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values and the scales of a matrix."""
        values, scales = quantize(weight, self.block, power_of_two=self.power_of_two)
        return {"": values, SCALE_SUFFIX: scales.to(self.scale_dtype)}

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix in bfloat16."""
        return dequantize(values, scales, self.block)
