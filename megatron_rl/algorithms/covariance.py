"""Clip-Cov and KL-Cov (arXiv 2505.22617): restrain the few tokens whose covariance drives the entropy down.

cov_t = (A_t - mean A) (lo_t - mean lo), with lo_t the old log-probability and the means over the trained tokens of the
global mini-batch. That it does not depend on the current weights is ours.

Legend: R trained tokens of a mini-batch or of a part of it, N numbers per token.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.config.section import Section
from megatron_rl.data.types import fold_seed


class Covariance(Section):
    """Tokens of high covariance of advantage and log-probability: no gradient, or a penalty instead of the clip."""

    kind: Literal["none", "clip", "kl"] = "none"
    """``clip``: random tokens with a covariance in [low, high] get no gradient; ``kl``: the tokens with the highest
    covariance have the cost -r A + coefficient |d|, with d the log ratio, in place of the clipped one."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Share of the trained tokens of the mini-batch that is chosen; at least one token."""
    low: float = 1.0
    """Smallest covariance of ``clip``."""
    high: float = 5.0
    """Largest covariance of ``clip``."""
    coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of |d| in ``kl``."""
    seed: int = 0
    """Seed of the random choice of ``clip``, which also depends on the tokens' log-probs."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} exceeds high = {self.high}: no token would be chosen; swap them")
        return self

    def chosen(self, tokens: Tokens) -> Tensor:
        """Return which tokens are chosen, bool [R]: the same for any order and division of the mini-batch."""
        old_R, advantages_R = tokens["old_logprobs_T"].double(), tokens.advantages_R.double()
        covariance_R = (advantages_R - tokens.mean(advantages_R)) * (old_R - tokens.mean(old_R))
        count = max(int(self.fraction * tokens.num_present), 1)
        if self.kind == "kl":
            return tokens.largest(covariance_R, count)
        inside_R = (covariance_R >= self.low) & (covariance_R <= self.high)
        keys_R = _random_keys(torch.stack((old_R, covariance_R)).view(torch.int64), self.seed)
        return inside_R & tokens.largest(torch.where(inside_R, keys_R, -torch.inf), count)


def _random_keys(bits_NR: Tensor, seed: int) -> Tensor:
    """Return pseudorandom numbers in [0, 1), float64 [R], that depend only on a token's bits and the seed.

    Steps like those of splitmix64, in wrapping int64 arithmetic.
    """
    keys_R = torch.full_like(bits_NR[0], fold_seed((seed,)))
    for bits_R in bits_NR:
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            keys_R = (keys_R ^ bits_R ^ ((keys_R ^ bits_R) >> shift)) * factor
    keys_R = keys_R ^ (keys_R >> 31)
    return (keys_R & ((1 << 53) - 1)).double() / (1 << 53)
