"""A checksum of a tensor's bytes that the device computes where the tensor is: a sum of weighted words modulo 2^64.

It finds what transport can do wrong (bytes that are missing, stale, or in another place), at the speed of memory; it is
no defence against someone who wants to deceive.

Legend: G tensors of one size, N bytes, W words of 64 bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

SUM64 = "sum64"
"""The name of the algorithm."""

_RUN = 1 << 16
"""Words at a time: the product of a run stays in the processor's cache."""
_TOGETHER_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Of small tensors in one operation, by kind of device: a CPU's cache holds them, a GPU has enough to do."""
_STEP, _NEXT = 0x3C6EF372FE94F82A, -0x40A7B892E31B1A47
"""Weights are multiples of the first, plus 1; runs are weighted by powers of the second. All are odd: no word loses
bits."""


def sums64(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each tensor's checksum, 16 digits of hexadecimal; waits for the device once."""
    names: list[str] = []
    sums: list[Tensor] = []
    for group in _groups(tensors):
        names += group
        sums.append(_sums64([tensors[name].detach().reshape(-1).view(torch.uint8) for name in group]))
    values = dict(zip(names, torch.cat(sums).tolist() if sums else (), strict=True))
    return {name: f"{values[name] & (1 << 64) - 1:016x}" for name in tensors}


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of tensors of equal size, as many as fit: a mixture has thousands of small ones."""
    by_size: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_size.setdefault(tensor.nbytes, []).append(name)
    for size, names in by_size.items():
        at_once = max(1, _TOGETHER_BYTES[tensors[names[0]].device.type] // max(size, 1))
        yield from (names[i : i + at_once] for i in range(0, len(names), at_once))


def _sums64(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of each, int64 [G], of bytes of one length: arithmetic of int64 wraps around on every device."""
    length, device = parts[0].numel(), parts[0].device
    whole = length // 8 * 8
    together = len(parts) > 1 or parts[0].storage_offset() % 8
    bytes_GN = torch.stack(list(parts)) if together else parts[0][None]
    words_GW = bytes_GN[:, :whole].reshape(-1).view(torch.int64).view(len(parts), whole // 8)
    tails_G8 = torch.zeros(len(parts), 8, dtype=torch.uint8, device=device)
    tails_G8[:, : length - whole] = bytes_GN[:, whole:]
    total_G = tails_G8.view(torch.int64)[:, 0] + length
    weights_W = _weights(device)
    for start in range(0, words_GW.shape[1], _RUN):
        run_GW = words_GW[:, start : start + _RUN]
        total_G = total_G * _NEXT + (run_GW * weights_W[: run_GW.shape[1]]).sum(1)
    return total_G


@cache
def _weights(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(_RUN, device=device) * _STEP + 1
