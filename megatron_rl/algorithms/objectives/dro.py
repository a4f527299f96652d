"""Direct reward optimization (DRO, arXiv 2405.19107): L = -sum_t w_t (A_t l_t - beta/2 d_t^2), d_t the log ratio.

The quadratic term, instead of a clip, keeps the policy close to the one that the ratio is to. This is the token form of
verl's policy loss ``dro``.
"""

from typing import Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, TokenMean, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class DRO(Anchored, TokenMean):
    """Policy gradient with a quadratic penalty on the log ratio of each token."""

    name: Literal["dro"] = "dro"
    beta: NonNegative = 0.1
    """Factor of the penalty d^2 / 2."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the gradient grows with the log ratio, not with the ratio."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -(A l - beta/2 d^2)."""
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        penalty_R = self.beta / 2 * ratio.token_log_R.square()
        return Cost(penalty_R - inputs.advantages_R * logprobs_R, no_tokens(logprobs_R), ratio)
