"""Minimum prefix ratio (MinPRO, arXiv 2601.22718): a token's ratio times the smallest ratio before it.

L = -sum_t w_t sg[clip(m_t r_t, 1 - clip_low, 1 + clip_high)] A_t l_t, with r_t the ratio of a token to the policy that
sampled, m_t the smallest ratio among the earlier trained tokens of the response (1 for the first), sg the
stop-gradient. m_t stands in for the product of all ratios of the prefix. The two bounds are ours.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchor, Anchored, Cost, NonNegative, TokenMean, Tokens
from megatron_rl.algorithms.segments import prefix_minima, segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


class MinPRO(Anchored, TokenMean):
    """Weight each token's log-likelihood by its clipped ratio times the smallest ratio of its prefix."""

    clipped_word: ClassVar[str] = "capped"

    name: Literal["minpro"] = "minpro"
    anchor: Anchor = "rollout"
    """Denominator of the importance ratio: ``rollout``, the policy that sampled, with the engine's log-probs;
    ``old``, the policy at the start of the step, with the trainer's log-probs."""
    clip_low: NonNegative = 0.2
    """The weight is at least 1 - clip_low."""
    clip_high: NonNegative = 0.28
    """The weight is at most 1 + clip_high."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the importance weight is capped."""
        return True

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights, every token as a segment in order, and its index in the response."""
        places_R = torch.arange(len(tokens))
        first_R = torch.searchsorted(tokens.responses_R, tokens.responses_R)
        columns = super().columns(tokens, vocabulary, segment_ids_R)
        return {**columns, "segment_ids_T": places_R, "extra_index_T": places_R - first_R}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[clip(m r)] A l; capped tokens are reported as clipped but still have a gradient."""
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        index_R = inputs.extra["index"]
        prefix_R = torch.where(index_R == 0, 0, prefix_minima(ratio.log_R, index_R, inputs))
        weight_R = (prefix_R + ratio.log_R).exp()
        capped_R = weight_R.clamp(1 - self.clip_low, 1 + self.clip_high)
        return Cost(-capped_R * inputs.advantages_R * logprobs_R, capped_R != weight_R, ratio)
