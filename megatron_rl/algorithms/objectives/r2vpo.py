"""Ratio-variance regularized policy optimization (R2VPO, arXiv 2601.03320): a penalty instead of a clip.

L = -sum_t w_t (r_t A_t - lam (r_t - 1)^2). The multiplier lam is adapted once per optimizer step on the global
mini-batch: lam <- max(0, lam + eta (E_w[(r - 1)^2] - delta)), E_w the mean weighted like the loss. The penalty form is
that of third-party code; the dual step is ours.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Anchored, Cost, NonNegative, TokenMean, Tokens, no_tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary

MULTIPLIER = "multiplier"


class R2VPO(Anchored, TokenMean):
    """Penalize the variance of the token ratios, with a multiplier that keeps it near a target."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["r2vpo"] = "r2vpo"
    multiplier: NonNegative = 0.04
    """Multiplier lam of the penalty at the start of the run."""
    delta: NonNegative = 0.05
    """Target of the mean of (r - 1)^2."""
    eta: NonNegative = 0.1
    """Step size of the multiplier per optimizer step; 0: the multiplier is fixed."""

    def initial_state(self) -> dict[str, float]:
        """Return the multiplier at the start of a run."""
        return {MULTIPLIER: self.multiplier}

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the multiplier after one step of dual ascent; unchanged if nothing was trained."""
        if not metrics["tokens"]:
            return {MULTIPLIER: state[MULTIPLIER]}
        excess = metrics["objective/ratio_variance"] - self.delta
        return {MULTIPLIER: max(0.0, state[MULTIPLIER] + self.eta * excess)}

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights and the multiplier."""
        columns = super().columns(tokens, vocabulary, segment_ids_R)
        return {**columns, "extra_multiplier_T": tokens.constant(tokens.state[MULTIPLIER])}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -(r A - lam (r - 1)^2), and (r - 1)^2 as the measure ``ratio_variance``."""
        ratio = segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)
        ratio_R = ratio.live(torch.ones_like(logprobs_R, dtype=torch.bool))
        variance_R = (ratio_R - 1).square()
        values_R = inputs.extra["multiplier"] * variance_R - ratio_R * inputs.advantages_R
        measures = {"ratio_variance": variance_R.detach(), "multiplier": inputs.extra["multiplier"]}
        return Cost(values_R, no_tokens(logprobs_R), ratio, measures)
