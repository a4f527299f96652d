"""A policy-gradient objective from outside the package; `custom_objective.toml` trains the demo with it.

    megatron-rl train configs/demo.toml examples/custom_objective.toml
    megatron-rl prove configs/demo.toml --objective examples/custom_objective.py:TruncatedIS --layout tensor=2
    megatron_rl.policy_loss({"name": "examples/custom_objective.py:TruncatedIS", "cap": 2.0}, ...)

The loss is L = -sum_t w_t sg[min(r_t, cap)] A_t l_t: the importance ratio r_t weights the log-probability l_t, without
a gradient, and is cut at `cap`. Tokens of low entropy can be left out.

Suffixes of tensors: `_R` has one value per trained token.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.objectives.base import Aggregated, Cost, NonNegative, Positive, Tokens
from megatron_rl.algorithms.segments import segment_ratio
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


# The class is its own section of the configuration: fields are options, and their docstrings the documentation.
# `Aggregated` adds `aggregation` and `normalizer`, which say how token costs are averaged.
class TruncatedIS(Aggregated):
    """Weight each token's log-likelihood by its importance ratio, cut at ``cap``."""

    cap: Positive = 2.0
    """Largest importance weight."""
    min_entropy: NonNegative = 0.0
    """Tokens whose entropy under the old policy is below this, in nats, are not trained."""

    # Called once per mini-batch, on whole responses, before any row is packed: everything that does not depend on the
    # weights being trained. A name ending in `_T` that starts with `extra_` is for `cost` alone.
    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the weights, from counts of the whole mini-batch, and which tokens are trained."""
        trained_R = (tokens.entropies_R >= self.min_entropy).double()
        return {"weights_T": self.weights(tokens), "extra_trained_T": trained_R}

    # Called once per packed row, on whichever ranks hold a part of it. Missing inputs are errors that name who provides
    # them: `inputs.require("rollout_logprobs_R")`.
    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return -sg[min(r, cap)] A l per token; capped tokens are reported as clipped."""
        ratio = segment_ratio(logprobs_R - inputs.old_logprobs_R, inputs)
        weight_R = ratio.value_R.clamp(max=self.cap) * inputs.extra["trained"]
        # A weight of 0 must also win over a log-probability of minus infinity.
        values_R = -weight_R * inputs.advantages_R * torch.where(weight_R > 0, logprobs_R, 0)
        return Cost(values_R, clipped_R=ratio.value_R > self.cap, ratio=ratio)
