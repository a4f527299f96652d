"""The types of the tensors that weight pushes send."""

from collections.abc import Mapping

import torch

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights."""
ENCODED = (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int32, torch.int64)
"""Further types of quantized values, their scales and shapes."""
DTYPES: Mapping[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in (*PLAIN, *ENCODED)}
"""All types, by name."""
