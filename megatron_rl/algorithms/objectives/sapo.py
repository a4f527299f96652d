"""Soft adaptive policy optimization (arXiv 2511.20347): a smooth gate instead of a clip.

L = -sum_t w_t f(r_t) A_t with f(r) = (4 / tau) sigmoid(tau (r - 1)) and a tau per sign of the advantage. The gradient
weight r sech^2(tau (r - 1) / 2) is 1 at r = 1, so an on-policy update is the plain policy gradient.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.finite import LARGEST_EXPONENT
from megatron_rl.algorithms.objectives.base import Aggregated, Anchored, Cost, Positive, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class SAPO(Anchored, Aggregated):
    """Pass each token's importance ratio through a sigmoid gate."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["sapo"] = "sapo"
    tau_positive: Positive = 1.0
    """Temperature of the gate where the advantage is positive."""
    tau_negative: Positive = 1.05
    """Temperature of the gate where the advantage is negative; values above ``tau_positive`` are more stable."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the gradient of the gate vanishes for large ratios."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -f(r) A; no token is reported as clipped."""
        advantages_R = inputs.advantages_R
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        tau_R = torch.full_like(logprobs_R, self.tau_negative).masked_fill(advantages_R > 0, self.tau_positive)
        ratio_R = ratio.token_log_R.clamp(max=LARGEST_EXPONENT).exp()
        gate_R = torch.sigmoid(tau_R * (ratio_R - 1)) * 4 / tau_R
        return Cost(-advantages_R * gate_R, no_tokens(advantages_R), ratio)
