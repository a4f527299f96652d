"""Logit-space convex optimization, KL form (LCO-KLD, arXiv 2603.00963), on policy, in closed form.

The target of a token's logits is the old ones plus A / beta at the sampled token. The gradient of the KL divergence
to that target with respect to the logits is k (pi - onehot), with pi the old probability of the sampled token and
k = pi (e^(A/beta) - 1) / (1 + pi (e^(A/beta) - 1)). So L = -sum_t w_t sg[k_t] l_t, where sg is the stop-gradient. The
closed form is ours. The off-policy form needs the old logits of the whole vocabulary and is not built.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Cost, Positive, TokenMean, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class LCO(TokenMean):
    """Weight each token's log-likelihood by the step that a convex problem in its logits asks for."""

    largest_exponent: ClassVar[float] = 60.0
    """A / beta is clamped to this size, so that k is finite in float32; its limits, 1 and -pi / (1 - pi), are reached
    earlier unless pi is below e^-60."""

    name: Literal["lco"] = "lco"
    beta: Positive = 1.0
    """Scale of the advantage: the target adds A / beta to the sampled token's logit."""

    @property
    def bounds_ratios(self) -> bool:
        """True: no ratio is in the loss."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[k] l; the ratio to the old policy is only reported."""
        ratio = segment_ratio(logprobs_R - inputs.old_logprobs_R, inputs)
        exponent_R = (inputs.advantages_R / self.beta).clamp(-self.largest_exponent, self.largest_exponent)
        old_R = inputs.old_logprobs_R
        total_R = (old_R + exponent_R).exp() - torch.expm1(old_R)  # 1 + pi (e^(A/beta) - 1), exact for pi near 1
        step_R = old_R.exp() * torch.expm1(exponent_R) / total_R
        return Cost(-step_R * logprobs_R, no_tokens(logprobs_R), ratio)
