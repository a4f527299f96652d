"""Asymmetric importance sampling (ASPO, arXiv 2510.06062): positive tokens are weighted by the inverse ratio.

L = -sum_t w_t sg[f_t] A_t l_t, with l_t the log-probability, f_t = 1 / r_t where A > 0 and r_t where A < 0, and sg the
stop-gradient. The gradient is 0 where A > 0 and r_t > 1 + e, or A < 0 and r_t < 1 - e. Other factors f_t above ``cap``
count as ``cap`` and keep their gradient (the soft dual clip). The window e is
``clip_high_entropy`` on the ``ceil(top_fraction N_i)`` tokens of a response with the highest entropy, else ``clip``.
Ours: the entropy is the old policy's, and the group rule is that of espo; the authors' code takes the current entropy.
"""

from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, TokenMean, Tokens
from megatron_rl.algorithms.segments import entropy_groups, segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


class ASPO(Anchored, TokenMean):
    """Weight each token's log-likelihood by its ratio, inverted where the advantage is positive."""

    name: Literal["aspo"] = "aspo"
    clip: NonNegative = 0.2
    """Window on both sides of 1 for tokens of lower entropy."""
    clip_high_entropy: NonNegative = 0.4
    """Window on both sides of 1 for tokens of high entropy."""
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a response's tokens, those of highest entropy, that has the window ``clip_high_entropy``."""
    cap: Annotated[float, Field(ge=1)] = 3.0
    """Largest factor f_t; larger ones count as this and keep their gradient."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the factor is capped."""
        return True

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights and the window of each token."""
        share = Fraction(str(self.top_fraction))
        groups_R = entropy_groups(tokens.entropies_R, tokens.responses_R, upper_shares=[share])
        window_R = torch.where(groups_R > 0, tokens.constant(self.clip_high_entropy), tokens.constant(self.clip))
        columns = super().columns(tokens, vocabulary, segment_ids_R)
        return {**columns, "clip_low_T": window_R, "clip_high_T": window_R}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[f] A l; masked tokens are reported as clipped and have no gradient."""
        advantages_R = inputs.advantages_R
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        low_R, high_R = 1 - inputs.require("clip_low_R"), 1 + inputs.require("clip_high_R")
        rises_R, falls_R = advantages_R > 0, advantages_R < 0
        active_R = (rises_R & (ratio.value_R <= high_R)) | (falls_R & (ratio.value_R >= low_R))
        factor_R = torch.where(rises_R, -ratio.log_R, ratio.log_R).exp().clamp(max=self.cap)
        values_R = -torch.where(active_R, factor_R, 0) * advantages_R * torch.where(active_R, logprobs_R, 0)
        return Cost(values_R, ~active_R & (advantages_R != 0), ratio)
