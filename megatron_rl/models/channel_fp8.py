"""FP8 weights with one scale per row (output channel), the ``float-quantized`` format of compressed-tensors.

Row i of ``X.weight`` equals its ``float8_e4m3fn`` values times ``X.weight_scale[i, 0]``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.models.quantized_format import Layout

SCALE_SUFFIX = "_scale"
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_rows(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (float8_e4m3fn values [rows, columns], scales [rows, 1]) of a matrix, on its device.

    Scales and quotients are computed in ``scale_dtype``, as compressed-tensors does with a model of that dtype. A row
    of zeros has the scale ``eps`` of the dtype.
    """
    weight = weight.to(scale_dtype)
    scales = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
    return (weight / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class ChannelFP8Format:
    """Per-channel FP8 as a ``QuantizedFormat``.

    Attributes:
        scale_dtype: dtype of the stored scales.
    """

    scale_dtype: torch.dtype = torch.bfloat16
    values_suffix: str = ""
    scales_suffix: str = SCALE_SUFFIX
    keeps_scales: bool = False

    @property
    def label(self) -> str:
        """The format in words."""
        return "FP8 with one scale per output channel"

    def with_scale_dtype(self, dtype: torch.dtype) -> "ChannelFP8Format":
        """Return the format with scales of this dtype."""
        return replace(self, scale_dtype=dtype)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix, given that of its values; they are equal."""
        return stored

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the values are not a matrix."""
        return (stored[0], 1) if len(stored) == 2 else None

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the values' and the scales' shapes and dtypes; None if the tensor is not a matrix."""
        if len(shape) != 2:
            return None
        return {"": (shape, torch.float8_e4m3fn), SCALE_SUFFIX: ((shape[0], 1), self.scale_dtype)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the values and the scales of a matrix."""
        values, scales = quantize_rows(weight, self.scale_dtype)
        return {"": values, SCALE_SUFFIX: scales}

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix in bfloat16; products are rounded once."""
        return (values.float() * scales.float()).bfloat16()
