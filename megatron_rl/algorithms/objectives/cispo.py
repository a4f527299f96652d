"""CISPO (MiniMax-M1, arXiv 2506.13585): L = -sum_t w_t sg[min(r_t, 1 + clip_high)] A_t l_t.

Only the importance weight is capped, so every token has a gradient. sg is the stop-gradient, l_t the log-probability.
"""

from typing import ClassVar, Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, TokenMean
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs


class CISPO(Anchored, TokenMean):
    """Weight each token's log-likelihood by its capped importance ratio."""

    clipped_word: ClassVar[str] = "capped"

    name: Literal["cispo"] = "cispo"
    clip_high: NonNegative = 4.0
    """The weight is at most 1 + clip_high. The paper gives no value; the default, a cap of 5, is in common use."""

    @property
    def bounds_ratios(self) -> bool:
        """True: the importance weight is capped."""
        return True

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[min(r, 1 + clip_high)] A l; capped tokens are reported as clipped but still have a gradient."""
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        cap = 1 + self.clip_high
        capped_R = ratio.value_R.clamp(max=cap)
        return Cost(-capped_R * inputs.advantages_R * logprobs_R, ratio.value_R > cap, ratio)
