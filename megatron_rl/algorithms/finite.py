"""Bounds that keep losses and gradients finite at a probability of 0 and at ratios beyond the range of float32."""

import torch
from torch import Tensor

LARGEST_EXPONENT = 20.0
"""Log ratios are clamped to at most 20 before exponentiation; a ratio of 5e8 is finite in float32, and so is its
square."""
SMALLEST_LOGPROB = -1e9
"""Log-probs below this value count as this value, without gradient: the probability is 0 in every dtype, also in a mean
over a long response, and squares and sums are finite."""


def finite_logprobs(logprobs: Tensor) -> Tensor:
    """Return the log-probs, raised to ``SMALLEST_LOGPROB`` where they are below it; NaN and +inf stay as they are.

    A token of probability 0 then has the ratio 0 to any other policy, and 1 to another one of probability 0.
    """
    return torch.where(logprobs < SMALLEST_LOGPROB, SMALLEST_LOGPROB, logprobs)
