"""Base classes of objectives: columns of whole responses, token weights of an aggregation, and the clipped cost.

Legend: T all tokens of a batch, R trained tokens (of a batch, or of a micro-batch on this rank), B responses.
"""

from collections.abc import Callable
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

Aggregation = Literal["sequence", "token", "constant", "sum"]
Anchor = Literal["old", "rollout"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


Total = Callable[[Tensor], Tensor]
"""Returns the element-wise sum of a tensor over all parts of a mini-batch; every part calls it in the same order."""


def only_part(values: Tensor) -> Tensor:
    """Return the tensor itself, which is its total if a batch is the whole mini-batch."""
    return values


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of a batch of whole responses: a mini-batch, or this rank's part of one.

    Columns have entries for the batch. The two counts and ``total`` are over the whole mini-batch.

    Attributes:
        batch: the batch.
        positions_R: int64, positions of the trained tokens among all tokens of the batch.
        responses_R: int64, index of the response that each trained token belongs to.
        counts_R: int64, number of trained tokens of that response (N_i of the equations).
        num_responses: number of responses of the mini-batch with a trained token (B of the equations).
        num_tokens: number of trained tokens of the mini-batch (the sum of N_i).
        total: adds a tensor over all parts of the mini-batch.
    """

    batch: Batch
    positions_R: Tensor
    responses_R: Tensor
    counts_R: Tensor
    num_responses: int
    num_tokens: int
    total: Total = only_part

    @classmethod
    def of(cls, batch: Batch, total: Total = only_part) -> "Tokens":
        """Return the trained tokens of ``batch``, with the counts of its mini-batch; collective if ``total`` is."""
        counts_B, positions_R = batch.trainable_counts_B, batch.trained_R
        responses_R = batch.response_ids_T[positions_R]
        responses, tokens = total(torch.stack([(counts_B > 0).sum(), counts_B.sum()])).tolist()
        return cls(batch, positions_R, responses_R, counts_B[responses_R], responses, tokens, total)

    def __len__(self) -> int:
        return len(self.positions_R)

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of the column ``name`` at the trained tokens, [R].

        Raises:
            ConfigError: the batch has no such column.
        """
        if name not in self.batch:
            known = ", ".join(sorted(self.batch.columns))
            raise ConfigError(f"the objective needs {name}, which the batch lacks: it has {known}")
        return self.batch[name][self.positions_R]

    @property
    def entropies_R(self) -> Tensor:
        """Entropies of the old policy at the trained tokens, in nats; a ConfigError if the batch has none."""
        if "old_entropies_T" not in self.batch:
            raise ConfigError("the objective needs the old policy's entropies (old_entropies_T in a batch): pass them")
        return self["old_entropies_T"]

    def mean(self, values_R: Tensor) -> Tensor:
        """Return the mean of the values over all trained tokens of the mini-batch, float64 scalar; NaN without any."""
        return self.total(values_R.double().sum()) / self.num_tokens

    def constant(self, value: float) -> Tensor:
        """Return ``value`` for every trained token, float64 [R]."""
        return torch.full((len(self),), value, dtype=torch.float64)

    def spread(self, values_R: Tensor) -> Tensor:
        """Return a column over all tokens, [T], with ``values_R`` at the trained tokens.

        Untrained tokens get -1 in integer columns and 0 in floating-point columns. Floating-point columns have the
        dtype of the log-probabilities, at least float32.
        """
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
    """The cost of each trained token of a micro-batch.

    Attributes:
        values_R: unweighted cost to minimize, with gradient.
        clipped_R: bool, True where the trust region clipped the token (masked or capped it, in some objectives).
        ratio: the importance ratio that the cost is based on.
    """

    values_R: Tensor
    clipped_R: Tensor
    ratio: Ratio


class Objective(Section):
    """Base class of objectives.

    ``prepare`` computes columns of a mini-batch that do not depend on the current weights; ``cost`` computes the cost
    of each token from those columns and the current log-probabilities.
    """

    clipped_word: ClassVar[str] = "clipped"
    """Participle that the report uses for the tokens in ``Cost.clipped_R``."""
    meant_for_several_updates: ClassVar[bool] = False
    """Whether ``check`` prints a note if a run has one update per step, where all ratios are 1."""

    name: str = ""

    @property
    def label(self) -> str:
        """The name of the objective; for a class in a file, without the folder."""
        return self.name.rpartition("/")[2]

    @property
    def bounds_ratios(self) -> bool:
        """Whether the gradient is bounded for arbitrarily large ratios.

        If it is not, ``check`` warns about asynchronous runs.
        """
        return False

    @property
    def ratio_to_rollout(self) -> bool:
        """Whether the importance ratio is that to the policy that sampled, so that no ``correction`` is needed."""
        return False

    def prepare(
        self,
        batch: Batch,
        vocabulary: Vocabulary | None = None,
        segment_ids_T: Tensor | None = None,
        total: Total = only_part,
    ) -> Columns:
        """Return the columns of a mini-batch, or of a part of one, that do not depend on the current weights.

        They are ``advantages_T``, ``weights_T`` and ``response_shares_T`` (1/N_i, which sums to the number of
        responses), and ``segment_ids_T``, ``clip_low_T`` and ``clip_high_T`` if the objective uses them. Weights are
        computed from global integer counts, so the sum of weighted costs over all ranks and micro-batches is the loss
        for every parallel layout.

        Args:
            batch: whole responses, with ``advantages_B`` or ``advantages_T``, and ``old_entropies_T`` if the objective
                uses entropies.
            vocabulary: required by objectives that use the text of tokens or log V.
            segment_ids_T: int64, segments to use in place of the objective's; unique per response, read at trained
                tokens only.
            total: adds a tensor over all parts of the mini-batch, see ``Tokens``; default: ``batch`` is all of it.

        Raises:
            ConfigError: the batch lacks a column, or the objective does not accept segments.
        """
        if self.ratio_to_rollout and "rollout_logprobs_T" not in batch:
            raise ConfigError(
                f"{self.label}, whose ratio is to the rollout policy, needs its log-probs: the batch has no "
                'rollout_logprobs; pass them, or write anchor = "old" if the objective has that option'
            )
        tokens = Tokens.of(batch, total)
        segment_ids_R = (
            None if segment_ids_T is None else joint_ids(tokens.responses_R, segment_ids_T[tokens.positions_R])
        )
        advantages = batch["advantages_T"] if "advantages_T" in batch else batch["advantages_B"][batch.response_ids_T]
        columns = {"advantages_T": advantages[tokens.positions_R], "response_shares_T": 1 / tokens.counts_R.double()}
        columns |= self.columns(tokens, vocabulary, segment_ids_R)
        return {name: tokens.spread(values_R) for name, values_R in columns.items()}

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return ``weights_T`` and the other columns that ``cost`` reads, as tensors over the trained tokens, [R] each.

        Args:
            tokens: the trained tokens, with global counts: an objective that needs a sum over the whole mini-batch uses
                ``tokens.total`` or ``tokens.mean``, because ``tokens`` may be one rank's part of it.
            vocabulary: the vocabulary of the model; None if the caller has none.
            segment_ids_R: int64, segments to use in place of the objective's; None: the objective's segments.
        """
        raise NotImplementedError

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return the cost of each trained token.

        Args:
            logprobs_R: log-probabilities under the current weights in nats, with gradient; float32 or float64.
            inputs: the columns of ``prepare`` and of the batch at the same tokens.
        """
        raise NotImplementedError

    def _refuse_segments(self, segment_ids_R: Tensor | None) -> None:
        if segment_ids_R is not None:
            name = type(self).__name__.lower()
            raise ConfigError(f"segment_ids passed to {name}, whose ratios are per token: leave them out, or use sspo")


class Aggregated(Objective):
    """Base class of objectives whose token weights are set by ``aggregation``."""

    aggregation: Aggregation = "sequence"
    """Weight of a token: ``sequence`` 1/(B N), the mean over responses of token means; ``token`` 1/sum N; ``constant``
    1/(B normalizer); ``sum`` 1/B."""
    normalizer: Positive | None = None
    """Constant in place of N with ``aggregation = "constant"``, such as the length of the longest allowed response."""

    @model_validator(mode="after")
    def _normalizer_goes_with_constant(self) -> Self:
        if (self.aggregation == "constant") != (self.normalizer is not None):
            raise ValueError(
                f'aggregation = "{self.aggregation}" with normalizer = {self.normalizer}: '
                'write normalizer = <tokens> with aggregation = "constant", and only then'
            )
        return self

    def weights(self, tokens: Tokens) -> Tensor:
        """Return the weight of each trained token in the loss, float64 [R]."""
        if self.aggregation == "sequence":
            return 1 / (tokens.num_responses * tokens.counts_R.double())
        if self.aggregation == "token":
            return tokens.constant(1 / max(tokens.num_tokens, 1))
        normalizer = 1.0 if self.aggregation == "sum" else self.normalizer
        assert normalizer is not None, "checked when the section was made"
        return tokens.constant(1 / (max(tokens.num_responses, 1) * normalizer))

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights, for objectives with a ratio per token whose cost needs no other column."""
        self._refuse_segments(segment_ids_R)
        return {"weights_T": self.weights(tokens)}


class TokenMean(Aggregated):
    """Base class of objectives whose published form is a mean over all tokens of the mini-batch."""

    aggregation: Aggregation = "token"
    """Weight of a token: ``token`` 1/sum N; ``sequence`` 1/(B N), the mean over responses of token means; ``constant``
    1/(B normalizer); ``sum`` 1/B."""


class Anchored(Objective):
    """Base class of objectives whose importance ratio is to one of two policies, selected by ``anchor``."""

    anchor: Anchor = "old"
    """Denominator of the importance ratio: ``old``, the policy at the start of the step, with the trainer's log-probs;
    ``rollout``, the policy that sampled, with the engine's log-probs, for which ``correction`` is left off."""

    @property
    def ratio_to_rollout(self) -> bool:
        """Whether ``anchor`` is ``rollout``."""
        return self.anchor == "rollout"

    def log_ratio(self, logprobs_R: Tensor, inputs: LossInputs) -> Tensor:
        """Return the log ratio of each token to the policy of ``anchor``, [R], with gradient to ``logprobs_R``."""
        if self.anchor == "old":
            return logprobs_R - inputs.old_logprobs_R
        return logprobs_R - inputs.require("rollout_logprobs_R").to(logprobs_R.dtype)


class Clipped(Anchored):
    """Base class of clipped objectives (PPO, arXiv 1707.06347), with one ratio s for all tokens of a segment.

    L = -sum_t w_t min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t).
    """

    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Upper bound of the ratio where the advantage is negative (c of dual-clip PPO, arXiv 1912.09729); none: off."""

    @property
    def bounds_ratios(self) -> bool:
        """Whether ``dual_clip`` is set; without it, the ratio has no bound where the advantage is negative."""
        return self.dual_clip is not None

    def cost(self, logprobs_R: Tensor, inputs: LossInputs) -> Cost:
        """Return the clipped cost of each token; outside the window the cost is constant and has no gradient."""
        return clipped(self.ratio(logprobs_R, inputs), inputs, self.dual_clip)

    def ratio(self, logprobs_R: Tensor, inputs: LossInputs) -> Ratio:
        """Return the importance ratio, the geometric mean over each segment."""
        return segment_ratio(self.log_ratio(logprobs_R, inputs), inputs)


class FixedWindow(Clipped, Aggregated):
    """Base class of clipped objectives with the fields ``clip_low`` and ``clip_high``."""

    clip_low: NonNegative
    """A segment with a negative advantage stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative
    """A segment with a positive advantage stops training when its ratio rises above 1 + clip_high."""

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights, the clip window, and the segments if tokens share ratios, [R] each."""
        if segment_ids_R is None:
            segment_ids_R = self.segments(tokens, vocabulary)
        low_R, high_R = self.window(tokens, vocabulary, segment_ids_R)
        shared = {} if segment_ids_R is None else {"segment_ids_T": segment_ids_R}
        return {"weights_T": self.weights(tokens), "clip_low_T": low_R, "clip_high_T": high_R, **shared}

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return the segment id of each trained token, int64 [R], or None if every token is a segment."""
        raise NotImplementedError

    def window(
        self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (low, high), [R] each: the ratio of each token's segment is clipped to [1 - low, 1 + high]."""
        return tokens.constant(self.clip_low), tokens.constant(self.clip_high)


def no_tokens(values_R: Tensor) -> Tensor:
    """Return False for every token, bool [R]: the ``Cost.clipped_R`` of an objective that clips nothing."""
    return torch.zeros_like(values_R, dtype=torch.bool)


def clipped(ratio: Ratio, inputs: LossInputs, dual_clip: float | None = None) -> Cost:
    """Return the clipped cost -min(s A, clip(s) A) of every token, computed without inf * 0.

    The gradient with respect to the log-probability is -A s inside the window (bounds included) and 0 outside.

    Args:
        ratio: the importance ratio s.
        inputs: advantages A and the window ``clip_low_R``, ``clip_high_R``.
        dual_clip: upper bound of s where A is negative; None: no bound.

    Raises:
        ConfigError: the batch has no clip window.
    """
    advantages_R, ratio_R = inputs.advantages_R, ratio.value_R
    lower_R, upper_R = 1 - inputs.require("clip_low_R"), 1 + inputs.require("clip_high_R")
    rises_R, falls_R = advantages_R > 0, advantages_R < 0
    active_R = (rises_R & (ratio_R <= upper_R)) | (falls_R & (ratio_R >= lower_R))
    bound_R = torch.where(rises_R, upper_R, lower_R)
    if dual_clip is not None:
        above_R = falls_R & (ratio_R > dual_clip)
        active_R &= ~above_R
        bound_R = torch.where(above_R, dual_clip, bound_R)
    values_R = -advantages_R * torch.where(active_R, ratio.live(active_R), bound_R)
    return Cost(values_R, ~active_R & (advantages_R != 0), ratio)
