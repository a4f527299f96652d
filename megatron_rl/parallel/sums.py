"""A checksum of a tensor's bytes that the device computes where the tensor is: a sum of weighted words modulo 2^64.

It finds what transport can do wrong (bytes that are missing, stale, or in another place), at the speed of memory; it is
no defence against someone who wants to deceive.

Legend: W words of 64 bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

SUM64 = "sum64"
"""The name of the algorithm."""

_RUN = 1 << 18
"""Words at a time: the product of a run stays in the processor's cache."""
_STEP, _NEXT = 0x3C6EF372FE94F82A, -0x40A7B892E31B1A47
"""Weights are multiples of the first, plus 1; runs are weighted by powers of the second. All are odd: no word loses
bits."""


def sums64(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each tensor's checksum, 16 digits of hexadecimal; waits for the device once."""
    if not tensors:
        return {}
    sums = torch.stack([_sum64(tensor) for tensor in tensors.values()]).tolist()
    return {name: f"{value & (1 << 64) - 1:016x}" for name, value in zip(tensors, sums, strict=True)}


def _sum64(tensor: Tensor) -> Tensor:
    """Return the sum, int64 []: arithmetic of int64 wraps around on every device."""
    bytes_N = tensor.detach().reshape(-1).view(torch.uint8)
    whole = bytes_N.numel() // 8 * 8
    aligned_N = bytes_N[:whole].clone() if bytes_N.storage_offset() % 8 else bytes_N[:whole]
    words_W = aligned_N.view(torch.int64)
    tail = torch.zeros(8, dtype=torch.uint8, device=tensor.device)
    tail[: bytes_N.numel() - whole] = bytes_N[whole:]
    total = tail.view(torch.int64)[0] + bytes_N.numel()
    weights_W = torch.arange(min(_RUN, len(words_W)), device=tensor.device) * _STEP + 1
    for start in range(0, len(words_W), _RUN):
        run_W = words_W[start : start + _RUN]
        total = total * _NEXT + (run_W * weights_W[: len(run_W)]).sum()
    return total
