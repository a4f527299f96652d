"""REINFORCE without an importance ratio (GPG, arXiv 2504.02546): L = -sum_t w_t A_t l_t, l_t the log-probability.

Old log-probs only enter the metrics: an update on old samples is biased, unless ``correction`` weighs or drops them.
"""

from typing import Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import Cost, TokenMean, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class Reinforce(TokenMean):
    """Weight each token's log-likelihood by its advantage only."""

    name: Literal["reinforce"] = "reinforce"

    @property
    def bounds_ratios(self) -> bool:
        """True: no ratio is in the loss."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -A l; the ratio to the old policy is only reported."""
        ratio = segment_ratio(logprobs_R - inputs.old_logprobs_R, inputs)
        return Cost(-inputs.advantages_R * logprobs_R, no_tokens(logprobs_R), ratio)
