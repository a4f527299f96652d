"""Group relative policy optimization (arXiv 2402.03300): one clipped ratio per token.

DAPO (arXiv 2503.14476) is ``clip_high = 0.28`` with ``aggregation = "token"``. Dr.GRPO (arXiv 2503.20783) is
``aggregation = "constant"`` with ``normalizer`` and ``dr`` advantages. Clip-Cov and KL-Cov (arXiv 2505.22617) are the
table ``covariance``; that tokens which KL-Cov does not choose keep the clip is ours, the paper has none.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import Covariance
from megatron_rl.algorithms.objectives.base import Cost, FixedWindow, NonNegative, Tokens
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Vocabulary


class GRPO(FixedWindow):
    """Clip the importance ratio of each token."""

    name: Literal["grpo"] = "grpo"
    clip_low: NonNegative = 0.2
    """A token with a negative advantage stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """A token with a positive advantage stops training when its ratio rises above 1 + clip_high."""
    covariance: Covariance = Covariance()

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return None: every token is a segment."""
        return None

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the columns of the clip, and which tokens ``covariance`` drops or penalizes."""
        columns = super().columns(tokens, vocabulary, segment_ids_R)
        if self.covariance.kind == "none":
            return columns
        chosen_R = self.covariance.chosen(tokens).double()
        if self.covariance.kind == "kl":
            return columns | {"extra_penalized_T": chosen_R}
        return columns | {"factors_T": (1 - chosen_R) * columns.get("factors_T", torch.ones_like(chosen_R))}

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return the clipped cost; for tokens that KL-Cov chose, -r A + coefficient |d| without a clip."""
        cost = super().cost(logprobs_R, inputs)
        if self.covariance.kind != "kl":
            return cost
        chosen_R = inputs.extra["penalized"] > 0
        penalty_R = self.covariance.coefficient * cost.ratio.token_log_R.abs()
        penalized_R = penalty_R - inputs.advantages_R * cost.ratio.live(chosen_R)
        values_R = torch.where(chosen_R, penalized_R, cost.values_R)
        return replace(cost, values_R=values_R, clipped_R=cost.clipped_R & ~chosen_R)
