"""What objectives share: columns on whole responses, the weights of an aggregation, the clipped cost.

Legend: T all tokens of the mini-batch, R trained tokens (of the mini-batch, or of a micro-batch on this rank),
B responses.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.segments import Ratio, joint_ids, segment_ratio
from megatron_rl.config.section import Section
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch, Columns
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError

Aggregation = Literal["sequence", "token", "constant"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of a global mini-batch.

    Attributes:
        batch: the mini-batch.
        positions_R: int64, where they are in the batch's T.
        responses_R: int64, the response that each belongs to.
        counts_R: int64, trained tokens of that response (N_i).
        num_responses: responses with a trained token (B of the denominators).
    """

    batch: Batch
    positions_R: Tensor
    responses_R: Tensor
    counts_R: Tensor
    num_responses: int

    @classmethod
    def of(cls, batch: Batch) -> "Tokens":
        """Return the view of a mini-batch."""
        counts_B, positions_R = batch.trainable_counts_B, batch.trained_R
        responses_R = batch.response_ids_T[positions_R]
        return cls(batch, positions_R, responses_R, counts_B[responses_R], int((counts_B > 0).sum()))

    def __len__(self) -> int:
        return len(self.positions_R)

    def __getitem__(self, name: str) -> Tensor:
        """Return the column ``name`` at the trained tokens."""
        if name not in self.batch:
            known = ", ".join(sorted(self.batch.columns))
            raise ConfigError(f"the objective needs {name}, which the batch lacks: it has {known}")
        return self.batch[name][self.positions_R]

    @property
    def entropies_R(self) -> Tensor:
        """The old policy's entropies, nats."""
        if "old_entropies_T" not in self.batch:
            raise ConfigError("the objective needs the old policy's entropies (old_entropies_T in a batch): give them")
        return self["old_entropies_T"]

    def constant(self, value: float) -> Tensor:
        """Return ``value`` for every trained token."""
        return torch.full((len(self),), value, dtype=torch.float64)

    def spread(self, values_R: Tensor) -> Tensor:
        """Return the column over T with these values (float32 or wider) at the trained tokens, else -1 (ids) or 0."""
        ids = not values_R.dtype.is_floating_point
        dtype = values_R.dtype if ids else torch.promote_types(self._dtype, torch.float32)
        column_T = torch.full((len(self.batch["loss_mask_T"]),), -1 if ids else 0, dtype=dtype)
        column_T[self.positions_R] = values_R.to(dtype)
        return column_T

    @property
    def _dtype(self) -> torch.dtype:
        known = [n for n in ("old_logprobs_T", "rollout_logprobs_T") if n in self.batch]
        return self.batch[known[0]].dtype if known else torch.float32


@dataclass(frozen=True)
class Cost:
    """What each trained token of a micro-batch costs.

    Attributes:
        values_R: to be minimised, with gradient, not yet weighted.
        clipped_R: bool, the tokens that the trust region took out of the gradient.
        ratio: the importance ratio that was used.
    """

    values_R: Tensor
    clipped_R: Tensor
    ratio: Ratio


class Objective(Section):
    """From a mini-batch to columns that do not depend on the current weights, and from those to a cost per token."""

    clipped_word: ClassVar[str] = "clipped"
    """How the report calls the tokens of ``Cost.clipped_R``."""
    meant_for_several_updates: ClassVar[bool] = False
    """Whether ``check`` notes a run with one update per step, where all ratios are 1."""

    name: str = ""

    @property
    def label(self) -> str:
        """The name, without the folder for a class in a file."""
        return self.name.rpartition("/")[2]

    @property
    def bounds_ratios(self) -> bool:
        """Whether the gradient stays bounded however large a ratio grows; ``check`` warns about asynchronous runs."""
        return False

    def prepare(
        self, batch: Batch, vocabulary: Vocabulary | None = None, segment_ids_T: Tensor | None = None
    ) -> Columns:
        """Return the theta-free columns of a global mini-batch of whole responses.

        Always ``advantages_T``, ``weights_T`` and ``response_shares_T`` (1/N_i: sums to the number of responses);
        ``segment_ids_T``, ``clip_low_T`` and ``clip_high_T`` where the objective has them. Weights come from global
        integer counts, so the plain sum of weighted costs over any layout is the loss.

        Args:
            batch: needs ``advantages_B`` or ``advantages_T``; ``old_entropies_T`` where entropies matter.
            vocabulary: for objectives that look at the text or at log V.
            segment_ids_T: used in place of the objective's own segments; read at trained tokens only, unique per
                response.
        """
        tokens = Tokens.of(batch)
        own_R = None if segment_ids_T is None else joint_ids(tokens.responses_R, segment_ids_T[tokens.positions_R])
        advantages = batch["advantages_T"] if "advantages_T" in batch else batch["advantages_B"][batch.response_ids_T]
        columns = {"advantages_T": advantages[tokens.positions_R], "response_shares_T": 1 / tokens.counts_R.double()}
        columns |= self.columns(tokens, vocabulary, own_R)
        return {name: tokens.spread(values_R) for name, values_R in columns.items()}

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return ``weights_T`` and what else ``cost`` reads, at the trained tokens."""
        raise NotImplementedError

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return what each trained token costs, from its log-probability under the current weights (with gradient)."""
        raise NotImplementedError

    def _refuse_segments(self, segment_ids_R: Tensor | None) -> None:
        if segment_ids_R is not None:
            name = type(self).__name__.lower()
            raise ConfigError(f"segment_ids given to {name}, whose ratios are per token: leave them out, or use sspo")


class Aggregated(Objective):
    """An objective whose token weights follow from how responses are averaged."""

    aggregation: Aggregation = "sequence"
    """``sequence``: mean over responses of token means; ``token``: 1/sum N; ``constant``: 1/(B normalizer)."""
    normalizer: Positive | None = None
    """Tokens that a response counts for with ``aggregation = "constant"``, such as the longest allowed response."""

    @model_validator(mode="after")
    def _normalizer_goes_with_constant(self) -> Self:
        if (self.aggregation == "constant") != (self.normalizer is not None):
            raise ValueError(
                f'aggregation = "{self.aggregation}" with normalizer = {self.normalizer}: '
                'write normalizer = <tokens> with aggregation = "constant", and only then'
            )
        return self

    def weights(self, tokens: Tokens) -> Tensor:
        """Return the weight of each trained token's cost, float64."""
        if self.aggregation == "sequence":
            return 1 / (tokens.num_responses * tokens.counts_R.double())
        if self.aggregation == "token":
            return tokens.constant(1 / max(len(tokens), 1))
        assert self.normalizer is not None, "checked when the section was made"
        return tokens.constant(1 / (max(tokens.num_responses, 1) * self.normalizer))


class Clipped(Objective):
    """L = -sum_t w_t min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t), one ratio s for all tokens of a segment."""

    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio that counts where the advantage is negative (the c of dual-clip PPO, 1912.09729); none: off."""

    @property
    def bounds_ratios(self) -> bool:
        """Whether ``dual_clip`` is set: without it, nothing bounds the ratio where the advantage is negative."""
        return self.dual_clip is not None

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return the clipped cost; tokens outside the window cost the constant bound and get no gradient."""
        return clipped(self.ratio(logprobs_R, inputs), inputs, self.dual_clip)

    def ratio(self, logprobs_R: Tensor, inputs: LossInputs) -> Ratio:
        """Return the ratio to the policy at the start of the rollout batch, geometric mean over each segment."""
        return segment_ratio(logprobs_R - inputs.old_logprobs_R, inputs)


class FixedWindow(Clipped, Aggregated):
    """A clipped objective with the same window for every segment."""

    clip_low: NonNegative
    """A segment with a negative advantage stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative
    """A segment with a positive advantage stops training when its ratio rises above 1 + clip_high."""

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return weights and window, and the segments if tokens share ratios."""
        if segment_ids_R is None:
            segment_ids_R = self.segments(tokens, vocabulary)
        low_R, high_R = self.window(tokens, vocabulary, segment_ids_R)
        shared = {} if segment_ids_R is None else {"segment_ids_T": segment_ids_R}
        return {"weights_T": self.weights(tokens), "clip_low_T": low_R, "clip_high_T": high_R, **shared}

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return the segment of each trained token, or None where each is its own."""
        raise NotImplementedError

    def window(
        self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (low, high): how far below and above 1 the ratio of each token's segment may go."""
        return tokens.constant(self.clip_low), tokens.constant(self.clip_high)


def clipped(ratio: Ratio, inputs: LossInputs, dual_clip: float | None = None) -> Cost:
    """Return -min(s A, clip(s) A) for every token, written so that nothing infinite meets a zero.

    The gradient with respect to the log-probability is -A s inside the window (bounds included) and 0 outside.
    """
    advantages_R, ratio_R = inputs.advantages_R, ratio.value_R
    lower_R, upper_R = 1 - inputs.require("clip_low_R"), 1 + inputs.require("clip_high_R")
    rises_R, falls_R = advantages_R > 0, advantages_R < 0
    kept_R = (rises_R & (ratio_R <= upper_R)) | (falls_R & (ratio_R >= lower_R))
    bound_R = torch.where(rises_R, upper_R, lower_R)
    if dual_clip is not None:
        above_R = falls_R & (ratio_R > dual_clip)
        kept_R &= ~above_R
        bound_R = torch.where(above_R, dual_clip, bound_R)
    values_R = -advantages_R * torch.where(kept_R, ratio.live(kept_R), bound_R)
    return Cost(values_R, ~kept_R & (advantages_R != 0), ratio)
