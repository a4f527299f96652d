"""Geometric mean policy optimization (arXiv 2507.20673): token log ratios are clipped, then averaged per response.

L = -(1/B) sum_i A_i exp(mean_t dc_t), dc_t = sgn(A) min(sgn(A) d_t, sgn(A) clip(d_t, -clip_low, clip_high)). A clipped
token loses its gradient; the other tokens of the response do not.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, Tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


class GMPO(Anchored):
    """Clip each token's log ratio, then take the geometric mean of the ratios per response."""

    name: Literal["gmpo"] = "gmpo"
    clip_low: NonNegative = 0.4
    """Where the advantage is negative, log ratios below -clip_low count as -clip_low."""
    clip_high: NonNegative = 0.4
    """Where the advantage is positive, log ratios above clip_high count as clip_high."""

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights 1 / (B N_i), which sum to 1 / B per response, and the response ids as segments."""
        ids_R = tokens.responses_R if segment_ids_R is None else segment_ids_R
        return {"weights_T": 1 / (tokens.num_responses * tokens.counts_R.double()), "segment_ids_T": ids_R}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -s A, with s the geometric mean of the clipped token ratios of the response."""
        advantages_R = inputs.advantages_R
        log_R = self.log_ratio(logprobs_R, inputs)
        clipped_log_R = torch.where(advantages_R > 0, log_R.clamp(max=self.clip_high), log_R.clamp(min=-self.clip_low))
        ratio = segment_ratio(clipped_log_R, inputs)
        clipped_R = (clipped_log_R != log_R) & (advantages_R != 0)
        return Cost(-advantages_R * ratio.live(torch.ones_like(clipped_R)), clipped_R, ratio)
