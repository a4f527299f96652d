"""Double-sided importance sampling (DIS, GLM-5, arXiv 2602.15763) and the loss of Kimi K2.5 (arXiv 2602.02276).

L = -sum_t w_t (clip(r_t, 1 - clip_low, 1 + clip_high) A_t - tau d_t^2), d_t the log ratio to the policy that sampled,
r_t = exp(d_t). Outside the band the clip removes the gradient whatever the sign of the advantage, unlike PPO's clip.
``tau = 0`` is DIS; Kimi K2.5 has ``tau`` above 0, whose term acts on every token. Neither paper prints the band; the
default is ours.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchor, Anchored, Cost, NonNegative, TokenMean
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class DIS(Anchored, TokenMean):
    """Drop the gradient of tokens whose ratio to the rollout policy is outside a band, for both signs of A."""

    name: Literal["dis"] = "dis"
    anchor: Anchor = "rollout"
    """Denominator of the importance ratio: ``rollout``, the policy that sampled, with the engine's log-probs;
    ``old``, the policy at the start of the step, with the trainer's log-probs."""
    clip_low: NonNegative = 0.2
    """A token stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative = 0.28
    """A token stops training when its ratio rises above 1 + clip_high."""
    tau: NonNegative = 0.0
    """Factor of the squared log ratio, which is added to the cost of every token."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the ratio's gradient is 0 outside the band."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -(clip(r) A - tau d^2); tokens outside the band are reported as clipped."""
        advantages_R = inputs.advantages_R
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        clipped_R = ratio.value_R.clamp(1 - self.clip_low, 1 + self.clip_high)
        inside_R = clipped_R == ratio.value_R
        values_R = -advantages_R * torch.where(inside_R, ratio.live(inside_R), clipped_R)
        if self.tau:
            values_R = values_R + self.tau * ratio.token_log_R.square()
        return Cost(values_R, ~inside_R & (advantages_R != 0), ratio)
