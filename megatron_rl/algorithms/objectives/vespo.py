"""Variational sequence-level soft policy optimization (VESPO, arXiv 2602.10693): a smooth weight per response.

log W_i = clamp(sum_t d_t, -18.42, 20) is the log ratio of a whole response, not normalized by its length, and
phi_i = e^lam W^k e^(-lam W) its weight, with k and lam per sign of the advantage: L = -sum_t w_t sg[phi_i] A_i l_t,
where sg is the stop-gradient. phi(1) = 1, so an on-policy update is the plain policy gradient. The bounds and the
defaults are those of trl 1.16.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.finite import LARGEST_EXPONENT
from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, TokenMean, Tokens
from megatron_rl.algorithms.segments import Ratio, segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary

SMALLEST_LOG_RATIO, LARGEST_LOG_SEQUENCE_RATIO = -18.42, 20.0
"""Bounds of the log ratio of a response."""


class VESPO(Anchored, TokenMean):
    """Weight each response's log-likelihood by a gamma-shaped function of its importance ratio."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["vespo"] = "vespo"
    k_positive: NonNegative = 2.0
    """Power k of the ratio where the advantage is not negative."""
    lambda_positive: NonNegative = 3.0
    """Rate lam of the exponential decay where the advantage is not negative."""
    k_negative: NonNegative = 3.0
    """Power k of the ratio where the advantage is negative."""
    lambda_negative: NonNegative = 2.0
    """Rate lam of the exponential decay where the advantage is negative."""

    @property
    def bounds_ratios(self) -> bool:
        """True if the weight decays for large ratios: both rates are above 0."""
        return min(self.lambda_positive, self.lambda_negative) > 0

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights and the response ids as segments."""
        ids_R = tokens.responses_R if segment_ids_R is None else segment_ids_R
        return {"weights_T": self.weights(tokens), "segment_ids_T": ids_R}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[phi] A l; the reported ratio is W, and tokens of a response with a clamped W count as clipped."""
        mean = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        sum_R = mean.log_R / mean.shares_R
        log_R = sum_R.clamp(SMALLEST_LOG_RATIO, LARGEST_LOG_SEQUENCE_RATIO)
        negative_R = inputs.advantages_R < 0
        power_R = torch.full_like(log_R, self.k_positive).masked_fill(negative_R, self.k_negative)
        rate_R = torch.full_like(log_R, self.lambda_positive).masked_fill(negative_R, self.lambda_negative)
        exponent_R = rate_R + power_R * log_R - rate_R * log_R.exp()
        phi_R = exponent_R.clamp(max=LARGEST_EXPONENT).exp().to(logprobs_R.dtype)
        ratio = Ratio(mean.token_log_R, log_R.to(logprobs_R.dtype), mean.shares_R)
        return Cost(-phi_R * inputs.advantages_R * logprobs_R, log_R != sum_R, ratio)
