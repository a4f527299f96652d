"""Exact percentiles of values that are distributed over ranks, without gathering or sorting them.

Legend: N values of this part.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DIGIT_BITS = 16
"""Bits that are counted at a time: 65,536 counts per order statistic and all-reduce."""


def order_statistics(values_N: Tensor, ranks: Sequence[int], total: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the values that would have these ranks if the values of all parts were sorted in ascending order.

    The bits of non-negative floating-point numbers order like the numbers, so each value is selected digit by digit
    (radix selection): four times, the counts of 16 bits are summed over the parts. The results are exact, and so do
    not depend on how values are distributed. NaN orders after infinity.

    Args:
        values_N: float64, non-negative or NaN; those of this part.
        ranks: from 0, each below the number of values of all parts.
        total: adds an int64 tensor over all parts; called four times.
    """
    keys_N = values_N.contiguous().view(torch.int64)
    prefixes, remaining = [0] * len(ranks), list(ranks)
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        different = sorted(set(prefixes))
        counts = total(torch.stack([_digit_counts(keys_N, prefix, shift) for prefix in different]))
        sums = dict(zip(different, counts.cumsum(1), strict=True))
        for index, prefix in enumerate(prefixes):
            ends = sums[prefix]
            digit = int(torch.searchsorted(ends, remaining[index], right=True))
            remaining[index] -= int(ends[digit - 1]) if digit else 0
            prefixes[index] = (prefix << DIGIT_BITS) | digit
    return torch.tensor(prefixes, dtype=torch.int64).view(torch.float64).tolist()


def _digit_counts(keys_N: Tensor, prefix: int, shift: int) -> Tensor:
    """Return how often each 16-bit digit at ``shift`` occurs among the keys whose higher bits are ``prefix``."""
    digits_N = keys_N >> shift
    if shift + DIGIT_BITS < 64:
        digits_N = digits_N[digits_N >> DIGIT_BITS == prefix]
    return torch.bincount(digits_N & ((1 << DIGIT_BITS) - 1), minlength=1 << DIGIT_BITS)
