"""Balanced policy optimization (BAPO, arXiv 2510.18927): PPO's clip with bounds that balance the signs of A.

L = -sum_t w_t min(r_t A_t, clip(r_t, c_low, c_high) A_t), with bounds found per mini-batch. They start at ``low`` and
``high``; while tokens with A > 0 have less than ``positive_share`` of the sum of r |A|, c_high is raised by
``high_step`` up to ``high_max``, then c_low by ``low_step`` up to ``low_max``. The sums are over the tokens of the
global mini-batch that have a gradient: A > 0 and r <= c_high, or A < 0 and r >= c_low (ours: in the printed form, which
sums values, a higher c_low lowers the share). r is that of the weights that the update starts from.
"""

import math
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from megatron_rl.algorithms.finite import LARGEST_EXPONENT
from megatron_rl.algorithms.objectives.base import (
    Aggregated,
    Clipped,
    Cost,
    NonNegative,
    Positive,
    Tokens,
    Total,
    only_part,
)
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary

ROUNDING = 1e-9
"""A last step shorter than this share of a step is none."""


class BAPO(Clipped, Aggregated):
    """Clip the ratio of each token, with bounds that give positive advantages a share of the gradient."""

    reads_current_logprobs: ClassVar[bool] = True

    name: Literal["bapo"] = "bapo"
    positive_share: NonNegative = 0.4
    """Smallest share of tokens with a positive advantage in the sum of r |A| (rho of the paper)."""
    low: NonNegative = 0.6
    """Lower bound of the ratio at the start of the search."""
    low_max: NonNegative = 0.9
    """Largest lower bound."""
    low_step: Positive = 0.02
    """Step of the lower bound."""
    high: NonNegative = 1.2
    """Upper bound of the ratio at the start of the search."""
    high_max: NonNegative = 3.0
    """Largest upper bound."""
    high_step: Positive = 0.05
    """Step of the upper bound."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.low > self.low_max or self.high > self.high_max:
            raise ValueError(
                f"the bounds start at {self.low}, {self.high} and end at {self.low_max}, {self.high_max}: write low at"
                " most low_max, and high at most high_max"
            )
        return self

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights and the bounds as a clip window."""
        self._refuse_segments(segment_ids_R)
        anchor = "rollout_logprobs_T" if self.anchor == "rollout" else "old_logprobs_T"
        log_R = tokens["current_logprobs_T"].double() - tokens[anchor].double()
        ratio_R = log_R.clamp(max=LARGEST_EXPONENT).exp()
        low, high, share = self.bounds(ratio_R, tokens.advantages_R.double(), tokens.total)
        return {
            "weights_T": self.weights(tokens),
            "clip_low_T": tokens.constant(1 - low),
            "clip_high_T": tokens.constant(high - 1),
            "extra_positive_share_T": tokens.constant(share),
        }

    def bounds(self, ratio_R: Tensor, advantages_R: Tensor, total: Total = only_part) -> tuple[float, float, float]:
        """Return c_low, c_high, and the share of positive advantages within them.

        Args:
            ratio_R: ratios of the trained tokens, float64.
            advantages_R: their advantages, float64.
            total: adds a tensor over all parts of the mini-batch.
        """
        lows = _steps(self.low, self.low_step, self.low_max)
        highs = _steps(self.high, self.high_step, self.high_max)
        sizes_R = ratio_R * advantages_R.abs()
        gains = [sizes_R[(advantages_R > 0) & (ratio_R <= high)].sum() for high in highs]
        losses = [sizes_R[(advantages_R < 0) & (ratio_R >= low)].sum() for low in lows]
        sums = total(torch.stack(gains + losses)).tolist()
        shares = [_share(gain, sums[len(highs)]) for gain in sums[: len(highs)]]
        shares += [_share(sums[len(highs) - 1], loss) for loss in sums[len(highs) + 1 :]]
        bounds = [(lows[0], high) for high in highs] + [(low, highs[-1]) for low in lows[1:]]
        for (low, high), share in zip(bounds, shares, strict=True):
            if share >= self.positive_share:
                return low, high, share
        return lows[-1], highs[-1], shares[-1]

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return the clipped cost, with the measures ``low``, ``high`` and ``positive_share``."""
        cost = super().cost(logprobs_R, inputs)
        bounds = {"low": 1 - inputs.require("clip_low_R"), "high": 1 + inputs.require("clip_high_R")}
        return replace(cost, measures={**bounds, "positive_share": inputs.extra["positive_share"]})


def _steps(first: float, step: float, last: float) -> list[float]:
    """Return first, first + step, ..., and last."""
    count = math.ceil((last - first) / step - ROUNDING)
    return [first + step * number for number in range(count)] + [last]


def _share(positive: float, negative: float) -> float:
    return positive / (positive + negative) if positive + negative else 1.0
