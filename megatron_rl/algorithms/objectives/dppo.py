"""Divergence PPO (arXiv 2602.04879): the trust region is a divergence from the rollout policy, not a ratio.

L = -sum_t w_t M_t sg[min(r_t, ratio_cap)] A_t l_t, with r = pi / mu, mu the rollout policy and l_t the log-probability.
M_t is 0 where a step would increase a divergence D that exceeds delta, (A > 0, r > 1) or (A < 0, r < 1), else 1. D is
the divergence of the binary distributions "this token or any other": total variation |pi - mu|, or KL(mu || pi).
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import binary_kl, binary_tv
from megatron_rl.algorithms.objectives.base import Cost, Positive, TokenMean
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs

DELTAS = {"tv": 0.2, "kl": 0.05}
"""Default of ``DPPO.delta`` for each divergence."""


class DPPO(TokenMean):
    """Mask tokens whose probability has moved too far from that of the rollout policy."""

    name: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    """``tv``: |pi - mu|; ``kl``: KL(mu || pi) of the binary event."""
    delta: Positive | None = None
    """Largest divergence; none: 0.2 for ``tv``, 0.05 for ``kl``."""
    ratio_cap: Positive = 20.0
    """Largest importance weight; the paper gives a range of 5 to 20."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the importance weight is capped."""
        return True

    @property
    def ratio_to_rollout(self) -> bool:
        """True: mu is the rollout policy."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -M sg[min(r, ratio_cap)] A l; masked tokens are reported as clipped and have no gradient."""
        advantages_R, log_mu_R = inputs.advantages_R, inputs.require("rollout_logprobs_R").to(logprobs_R.dtype)
        ratio = segment_ratio(logprobs_R - log_mu_R, inputs)
        divergence = binary_tv if self.divergence == "tv" else binary_kl
        outside_R = divergence(log_mu_R, logprobs_R.detach()) > (self.delta or DELTAS[self.divergence])
        diverging_R = ((advantages_R > 0) & (ratio.log_R > 0)) | ((advantages_R < 0) & (ratio.log_R < 0))
        masked_R = outside_R & diverging_R
        weight_R = torch.where(masked_R, 0, ratio.value_R.clamp(max=self.ratio_cap))
        return Cost(-weight_R * advantages_R * torch.where(masked_R, 0, logprobs_R), masked_R, ratio)
