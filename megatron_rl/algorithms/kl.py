"""Single-sample estimators of the KL divergence, and the KL penalty against a reference policy.

Legend: R trained tokens of a micro-batch on this rank.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.finite import LARGEST_EXPONENT
from megatron_rl.config.section import Section


class ReferenceKL(Section):
    """KL penalty against a reference policy, with the same token weights as the objective."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the penalty; 0 disables it."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """With d = log-prob - reference log-prob: ``k1``: d; ``k2``: d^2 / 2; ``k3``: exp(-d) + d - 1; ``abs``: |d|."""
    unbiased: bool = False
    """Multiply ``k3`` by the ratio of current to old policy, which is differentiated, so that its gradient is an
    unbiased estimate of that of the KL divergence (DeepSeek-V3.2, arXiv 2512.02556)."""
    placement: Literal["loss", "reward"] = "loss"
    """``loss``: add the penalty to the loss; ``reward``: subtract coefficient times the sum over the response's tokens,
    of the old policy and without gradient, from its reward before advantages."""
    refresh_every: Annotated[int, Field(ge=0)] = 0
    """Steps between updates of the reference, after which it is ``refresh_decay`` times itself plus the rest of the
    policy; 0: the reference stays the policy that the run starts with."""
    refresh_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the old reference in the new one; 0 replaces it, a value near 1 is a moving average."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.unbiased and self.estimator != "k3":
            raise ValueError(
                f'unbiased = true is defined for estimator = "k3" only, got "{self.estimator}": write "k3"'
            )
        if self.unbiased and self.placement == "reward":
            raise ValueError(
                'unbiased = true corrects a gradient, which placement = "reward" does not have: write false'
            )
        if self.refresh_decay and not self.refresh_every:
            raise ValueError(f"refresh_decay = {self.refresh_decay} needs refresh_every: write a number of steps")
        return self

    def cost(self, logprobs_R: Tensor, ref_logprobs_R: Tensor, old_logprobs_R: Tensor) -> Tensor:
        """Return the estimate of KL(policy || reference) in nats per token, [R], with gradient to ``logprobs_R``."""
        log_ratio_R = logprobs_R - ref_logprobs_R
        if self.estimator == "k1":
            return log_ratio_R
        if self.estimator == "abs":
            return log_ratio_R.abs()
        if self.estimator == "k2":
            return log_ratio_R.square() / 2
        ratio_R = (logprobs_R - old_logprobs_R).clamp(max=LARGEST_EXPONENT).exp() if self.unbiased else 1.0
        return ratio_R * k3(-log_ratio_R)

    @property
    def in_loss(self) -> float:
        """Factor of the penalty in the loss."""
        return self.coefficient if self.placement == "loss" else 0.0

    @property
    def in_reward(self) -> float:
        """Factor of the penalty that is subtracted from rewards."""
        return self.coefficient if self.placement == "reward" else 0.0


def k3(log_ratio: Tensor) -> Tensor:
    """Return the k3 estimate exp(x) - x - 1 of the KL divergence, elementwise.

    With x = log q - log p and samples from p it is an unbiased, non-negative estimate of KL(p || q) in nats (Schulman,
    "Approximating KL divergence", 2020). Only the exponent is clamped to [-20, 20], not the linear term: for large |x|
    the gradient is that of -x.
    """
    return torch.expm1(log_ratio.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)) - log_ratio


def binary_kl(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return KL(p || q) in nats of the event "this token or any other", elementwise, from log p and log q."""
    smallest = torch.finfo(logprobs.dtype).tiny  # a probability of 1 leaves nothing for other tokens
    # Rounding may lift a log-prob slightly above 0.
    rest, other_rest = (-torch.expm1(values) for values in (logprobs, other_logprobs))
    rest, other_rest = rest.clamp(min=0), other_rest.clamp(min=smallest)
    return logprobs.exp() * (logprobs - other_logprobs) + torch.special.xlogy(rest, rest / other_rest)


def binary_tv(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return the total variation |p - q| of the event "this token or any other", elementwise, from log p and log q."""
    return (other_logprobs.exp() - logprobs.exp()).abs()
