"""Single-sample estimators of the KL divergence, and the KL penalty against a reference policy.

Legend: R trained tokens of a micro-batch on this rank.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.config.section import Section

LARGEST_EXPONENT = 20.0
"""Log ratios are clamped to [-20, 20] before exponentiation."""


class ReferenceKL(Section):
    """KL penalty against a frozen reference policy, with the same token weights as the objective."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the penalty; 0 disables it."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log-prob - reference log-prob: ``k1``: d; ``k2``: d^2 / 2; ``k3``: exp(-d) + d - 1."""

    def cost(self, logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
        """Return the estimate of KL(policy || reference) in nats per token, [R], with gradient to ``logprobs_R``."""
        log_ratio_R = logprobs_R - ref_logprobs_R
        if self.estimator == "k1":
            return log_ratio_R
        return log_ratio_R.square() / 2 if self.estimator == "k2" else k3(-log_ratio_R)


def k3(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimate exp(x) - x - 1 of the KL divergence, elementwise.

    With x = log q - log p and samples from p it is an unbiased, non-negative estimate of KL(p || q) in nats (Schulman,
    "Approximating KL divergence", 2020). Only the exponent is clamped to [-20, 20], not the linear term: for large |x|
    the gradient is that of -x.
    """
    return torch.expm1(log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)) - log_ratio
