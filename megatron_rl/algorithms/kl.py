"""Estimators of the KL divergence from single samples, and the penalty for leaving a reference policy.

Legend: R trained tokens of a micro-batch on this rank.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.config.section import Section

LARGEST_EXPONENT = 20.0
"""Log ratios are clamped to +-20 before they are exponentiated."""


class ReferenceKL(Section):
    """A penalty for leaving a frozen reference policy, weighted like the objective's tokens."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the penalty; 0 switches it off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log-prob - reference log-prob: ``k1``: d; ``k2``: d^2 / 2; ``k3``: exp(-d) + d - 1."""

    def cost(self, logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
        """Return the estimate of KL(policy || reference) at each token, with gradient."""
        log_ratio_R = logprobs_R - ref_logprobs_R
        if self.estimator == "k1":
            return log_ratio_R
        return log_ratio_R.square() / 2 if self.estimator == "k2" else k3(-log_ratio_R)


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(x) - x - 1: for x = log q - log p with samples from p, an unbiased estimate of KL(p || q), >= 0.

    The exponent is clamped to +-20, the linear term is not: far away the gradient stays that of -x.
    """
    return torch.expm1(log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)) - log_ratio
