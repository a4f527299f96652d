"""INT4 weights with one scale per group of columns, the ``pack-quantized`` format of compressed-tensors.

``X.weight`` is stored as ``X.weight_packed``, int32 [rows, columns / 8] with eight elements per word, the first in the
lowest bits and each stored as value + 8; ``X.weight_scale`` [rows, columns / group]; and ``X.weight_shape``. Values
are -8 to 7. Kimi-K2-Thinking uses groups of 32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.models.quantized_format import Layout

PACKED_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX = "_packed", "_scale", "_shape"
_MIN, _MAX, _BITS = -8, 7, 4
_PER_WORD = 32 // _BITS


def quantize_groups(weight: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (int32 values [rows, columns], scales [rows, columns / group]) of a matrix, on its device.

    Scales and quotients are computed in ``scale_dtype``, as compressed-tensors does with a model of that dtype. A
    group of zeros has the scale ``eps`` of the dtype.
    """
    groups = weight.to(scale_dtype).unflatten(1, (-1, group))
    scales = groups.abs().amax(dim=2) / ((_MAX - _MIN) / 2)
    scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
    values = (groups / scales[..., None]).clamp(_MIN, _MAX).round()
    return values.flatten(1).int(), scales


def pack(values: Tensor) -> Tensor:
    """Return values of -8 to 7, [rows, columns], as int32 words [rows, columns / 8]."""
    nibbles = (values.int() - _MIN).unflatten(1, (-1, _PER_WORD))
    shifts = torch.arange(0, 32, _BITS, device=values.device, dtype=torch.int32)
    return (nibbles << shifts).sum(2, dtype=torch.int32)


def unpack(words: Tensor) -> Tensor:
    """Return the values of int32 words, the inverse of ``pack``."""
    shifts = torch.arange(0, 32, _BITS, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts & 15) + _MIN).flatten(1)


@dataclass(frozen=True)
class INT4Format:
    """INT4 as a ``QuantizedFormat``.

    Attributes:
        group: columns per scale, a multiple of 8.
        scale_dtype: dtype of the stored scales.
    """

    group: int = 32
    scale_dtype: torch.dtype = torch.bfloat16
    values_suffix: str = PACKED_SUFFIX
    scales_suffix: str = SCALE_SUFFIX
    keeps_scales: bool = False

    @property
    def label(self) -> str:
        """The format in words."""
        return f"INT4 in groups of {self.group}"

    def with_scale_dtype(self, dtype: torch.dtype) -> "INT4Format":
        """Return the format with scales of this dtype."""
        return replace(self, scale_dtype=dtype)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix, given that of its words."""
        return (*stored[:-1], stored[-1] * _PER_WORD)

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the expected shape of the scales; None if the words are not a matrix."""
        return (stored[0], stored[1] * _PER_WORD // self.group) if len(stored) == 2 else None

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the stored tensors' shapes and dtypes; None if the columns are not whole groups."""
        if len(shape) != 2 or shape[1] % self.group:
            return None
        return {
            PACKED_SUFFIX: ((shape[0], shape[1] // _PER_WORD), torch.int32),
            SCALE_SUFFIX: ((shape[0], shape[1] // self.group), self.scale_dtype),
            SHAPE_SUFFIX: ((2,), torch.int64),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the words, the scales and the shape of a matrix."""
        values, scales = quantize_groups(weight, self.group, self.scale_dtype)
        shape = torch.tensor(weight.shape, dtype=torch.int64, device=weight.device)
        return {PACKED_SUFFIX: pack(values), SCALE_SUFFIX: scales, SHAPE_SUFFIX: shape}

    def decode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the matrix in bfloat16; products are rounded once."""
        numbers = unpack(values).float().unflatten(1, (-1, self.group))
        return (numbers * scales.float()[..., None]).flatten(1).bfloat16()
