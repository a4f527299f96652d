"""Checksums of tensors, which the sender and the receiver of weights compare.

SHA-256 runs on one CPU thread. ``sum64``, a sum of weighted 64-bit words modulo 2^64, runs on the tensor's device at
memory speed. It detects transport errors (missing, stale, or misplaced bytes) and is not a defense against an attacker.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

SHA256 = "sha256"
"""SHA-256 of a tensor's bytes, row-major and little-endian."""
SHORT_SHA256 = "sha256/8"
"""The first 8 bytes of the SHA-256, as SGLang computes it on a CPU. SGLang fuses some tensors, whose names the sender
then does not have, and pads others with rows of zeros."""
SHORT_SHA256_DIGITS = 16
SUM64 = "sum64"
"""Sum of weighted 64-bit words modulo 2^64."""

_PAD_ROWS = 64
"""SGLang pads the rows of vocabulary tables to a multiple of this number."""
_BLOCK_WORDS = 1 << 16
"""Words per product: small enough that the product stays in the processor's cache."""
_BATCH_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of small tensors per operation, by device type: what fits a CPU's cache, or keeps a GPU busy."""
_WORD_FACTOR, _BLOCK_FACTOR = 0x3C6EF372FE94F82A, -0x40A7B892E31B1A47
"""Word ``i`` of a block has weight ``i * _WORD_FACTOR + 1``; blocks are weighted by powers of ``_BLOCK_FACTOR``. All
weights are odd, so that no bit of a word is lost."""


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of the tensor's bytes as 64 hexadecimal digits."""
    return padded_sha256(tensor)[0]


def padded_sha256(tensor: Tensor) -> tuple[str, str]:
    """Return the SHA-256 of the tensor's bytes, without and with the rows of zeros that SGLang may append."""
    digest = hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    padded = digest.copy()
    if tensor.dim() == 2:
        padded.update(bytes(-len(tensor) % _PAD_ROWS * tensor[0].nbytes))
    return digest.hexdigest(), padded.hexdigest()


def sums64(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the ``sum64`` of each tensor as 16 hexadecimal digits; synchronizes with the device once."""
    names: list[str] = []
    sums: list[Tensor] = []
    for group in _equal_sizes(tensors):
        names += group
        sums.append(_sums64([tensors[name].detach().reshape(-1).view(torch.uint8) for name in group]))
    values = dict(zip(names, torch.cat(sums).tolist() if sums else (), strict=True))
    return {name: f"{values[name] & (1 << 64) - 1:016x}" for name in tensors}


def _equal_sizes(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield names of tensors of equal size, together up to ``_BATCH_BYTES``; experts are thousands of small tensors."""
    by_size: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_size.setdefault(tensor.nbytes, []).append(name)
    for size, names in by_size.items():
        count = max(1, _BATCH_BYTES[tensors[names[0]].device.type] // max(size, 1))
        yield from (names[i : i + count] for i in range(0, len(names), count))


def _sums64(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums, int64 [tensors], of byte tensors of equal length; int64 arithmetic wraps around everywhere."""
    count, length, device = len(tensors), tensors[0].numel(), tensors[0].device
    whole = length // 8 * 8
    must_copy = count > 1 or tensors[0].storage_offset() % 8
    data = torch.stack(list(tensors)) if must_copy else tensors[0][None]  # [tensors, bytes]
    words = data[:, :whole].reshape(-1).view(torch.int64).view(count, whole // 8)  # [tensors, words]
    tails = torch.zeros(count, 8, dtype=torch.uint8, device=device)
    tails[:, : length - whole] = data[:, whole:]
    totals = tails.view(torch.int64)[:, 0] + length
    factors = _word_factors(device)
    for start in range(0, words.shape[1], _BLOCK_WORDS):
        block = words[:, start : start + _BLOCK_WORDS]
        totals = totals * _BLOCK_FACTOR + (block * factors[: block.shape[1]]).sum(1)
    return totals


@cache
def _word_factors(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(_BLOCK_WORDS, device=device) * _WORD_FACTOR + 1
