"""Divergence PPO (arXiv 2602.04879): the trust region is a divergence from the rollout policy, not a ratio.

L = -sum_t w_t M_t sg[min(r_t, ratio_cap)] A_t l_t, r = pi / mu with mu the rollout policy. M_t is 0 where the step
would lead further away: (A > 0, r > 1, D > delta) or (A < 0, r < 1, D > delta). D is taken over the two events "this
token" and "another one": total variation |pi - mu|, or KL(mu || pi).
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Aggregated, Aggregation, Cost, Positive, Tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError

DELTAS = {"tv": 0.2, "kl": 0.05}


class DPPO(Aggregated):
    """Mask the tokens whose probability has moved too far from the rollout policy's."""

    name: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    """``tv``: |pi - mu|; ``kl``: KL(mu || pi) of the binary event."""
    delta: Positive | None = None
    """Largest divergence; none: 0.2 for ``tv``, 0.05 for ``kl``."""
    ratio_cap: Positive = 20.0
    """Largest importance weight; the paper gives a range of 5 to 20."""
    aggregation: Aggregation = "token"
    """``token``: 1/sum N; ``sequence``: mean over responses of token means; ``constant``: 1/(B normalizer)."""

    @property
    def bounds_ratios(self) -> bool:
        """The weight is capped."""
        return True

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the weights."""
        self._refuse_segments(segment_ids_R)
        if "rollout_logprobs_T" not in tokens.batch:
            raise ConfigError("dppo is anchored at the rollout policy: the batch has no rollout_logprobs; give them")
        return {"weights_T": self.weights(tokens)}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -M sg[min(r, cap)] A l."""
        advantages_R, anchor_R = inputs.advantages_R, inputs.require("rollout_logprobs_R").to(logprobs_R.dtype)
        ratio = segment_ratio(logprobs_R - anchor_R, inputs)
        far_R = self._divergence(logprobs_R.detach(), anchor_R) > (self.delta or DELTAS[self.divergence])
        away_R = ((advantages_R > 0) & (ratio.log_R > 0)) | ((advantages_R < 0) & (ratio.log_R < 0))
        masked_R = far_R & away_R
        weight_R = torch.where(masked_R, 0, ratio.value_R.clamp(max=self.ratio_cap))
        return Cost(-weight_R * advantages_R * torch.where(masked_R, 0, logprobs_R), masked_R, ratio)

    def _divergence(self, logprobs_R: Tensor, anchor_R: Tensor) -> Tensor:
        if self.divergence == "tv":
            return (logprobs_R.exp() - anchor_R.exp()).abs()
        other_R, anchor_other_R = -torch.expm1(logprobs_R), -torch.expm1(anchor_R)
        return anchor_R.exp() * (anchor_R - logprobs_R) + torch.special.xlogy(anchor_other_R, anchor_other_R / other_R)
