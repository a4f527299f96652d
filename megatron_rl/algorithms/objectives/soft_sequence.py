"""Soft sequence policy optimization (arXiv 2602.19327), experimental: read from summaries, not from the paper.

L = -(1/B) sum_i A_i exp(mean_t arctan(d_t)), with d_t the log ratio of a token: a geometric mean of token ratios whose
outliers are softened instead of clipped. The gradient is -A s / (1 + d_t^2) / (B N_i), s the value of the exponential.
"""

from typing import ClassVar, Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, Tokens, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


class SoftSequence(Anchored):
    """Soften each token's log ratio by arctan, then take the geometric mean of the ratios per response."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["soft_sequence"] = "soft_sequence"

    @property
    def bounds_ratios(self) -> bool:
        """True: the softened ratio is at most e^(pi/2)."""
        return True

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights 1 / (B N_i), which sum to 1 / B per response, and the response ids as segments."""
        ids_R = tokens.responses_R if segment_ids_R is None else segment_ids_R
        return {"weights_T": 1 / (tokens.num_responses * tokens.counts_R.double()), "segment_ids_T": ids_R}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -s A, with s the geometric mean of the softened token ratios of the response."""
        clipped_R = no_tokens(logprobs_R)
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs).atan(), inputs)
        return Cost(-inputs.advantages_R * ratio.live(~clipped_R), clipped_R, ratio)
