"""Base classes of objectives: columns of whole responses, token weights of an aggregation, and the clipped cost.

Legend: T all tokens of a batch, R trained tokens (of a batch, or of a micro-batch on this rank), B responses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.segments import Ratio, entropy_groups, joint_ids, segment_ratio
from megatron_rl.algorithms.tokens import Tokens as Tokens
from megatron_rl.algorithms.tokens import Total as Total
from megatron_rl.algorithms.tokens import only_part as only_part
from megatron_rl.config.section import Section
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch, Columns
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError

Aggregation = Literal["sequence", "token", "constant", "sum"]
Anchor = Literal["old", "rollout"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Cost:
    """The cost of each trained token of a micro-batch.

    Attributes:
        values_R: unweighted cost to minimize, with gradient.
        clipped_R: bool, True where the trust region clipped the token (masked or capped it, in some objectives).
        ratio: the importance ratio that the cost is based on.
        measures: further values per token by name, without gradient; their means, weighted like the loss over the whole
            mini-batch, are the metrics ``objective/NAME`` and the input of ``Objective.next_state``.
    """

    values_R: Tensor
    clipped_R: Tensor
    ratio: Ratio
    measures: Columns = field(default_factory=dict)


class Objective(Section):
    """Base class of objectives.

    ``prepare`` computes columns of a mini-batch that do not depend on the current weights; ``cost`` computes the cost
    of each token from those columns and the current log-probabilities.
    """

    clipped_word: ClassVar[str] = "clipped"
    """Participle that the report uses for the tokens in ``Cost.clipped_R``."""
    meant_for_several_updates: ClassVar[bool] = False
    """Whether ``check`` prints a note if a run has one update per step, where all ratios are 1."""
    reads_current_logprobs: ClassVar[bool] = False
    """Whether ``columns`` reads ``current_logprobs_T``, the log-probs under the weights that the update starts from.

    They cost a forward pass per update, except for the first of a step, whose weights are those of the old policy."""

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

    def initial_state(self) -> dict[str, float]:
        """Return the numbers that the objective adapts, at the start of a run; empty for most objectives.

        ``columns`` reads them as ``tokens.state`` and hands them to ``cost`` as columns.
        """
        return {}

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Return these numbers after an optimizer step.

        Args:
            state: their values during the step.
            metrics: metrics of the whole mini-batch, as returned by ``algorithms.loss.summary``, equal on all ranks.
        """
        return {name: state[name] for name in self.initial_state()}

    def prepare(
        self,
        batch: Batch,
        vocabulary: Vocabulary | None = None,
        segment_ids_T: Tensor | None = None,
        total: Total = only_part,
        state: Mapping[str, float] | None = None,
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
            state: numbers that the loss adapts; None: those at the start of a run.

        Raises:
            ConfigError: the batch lacks a column, or the objective does not accept segments.
        """
        if self.ratio_to_rollout and "rollout_logprobs_T" not in batch:
            raise ConfigError(
                f"{self.label}, whose ratio is to the rollout policy, needs its log-probs: the batch has no "
                'rollout_logprobs; pass them, or write anchor = "old" if the objective has that option'
            )
        tokens = Tokens.of(batch, total, self.initial_state() if state is None else state)
        segment_ids_R = (
            None if segment_ids_T is None else joint_ids(tokens.responses_R, segment_ids_T[tokens.positions_R])
        )
        columns = {"advantages_T": tokens.advantages_R, "response_shares_T": 1 / tokens.counts_R.double()}
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
    top_entropy_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of tokens, those with the highest entropy under the old policy, that gets a gradient; denominators keep all
    tokens (arXiv 2506.01939, which takes 0.2); none: all tokens."""
    top_entropy_scope: Literal["response", "batch"] = "response"
    """Set of tokens that ``top_entropy_fraction`` is a share of: a response, or the global mini-batch."""

    def columns(self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None) -> dict[str, Tensor]:
        """Return the token weights, the clip window, and the segments if tokens share ratios, [R] each."""
        if segment_ids_R is None:
            segment_ids_R = self.segments(tokens, vocabulary)
        low_R, high_R = self.window(tokens, vocabulary, segment_ids_R)
        shared = {} if segment_ids_R is None else {"segment_ids_T": segment_ids_R}
        columns = {"weights_T": self.weights(tokens), "clip_low_T": low_R, "clip_high_T": high_R, **shared}
        return columns if self.top_entropy_fraction is None else columns | {"factors_T": self._top_entropy(tokens)}

    def _top_entropy(self, tokens: Tokens) -> Tensor:
        """Return 1 for the ``ceil(top_entropy_fraction N)`` tokens of highest entropy, else 0, float64 [R].

        Ties go to the earlier token of a response; in the scope ``batch``, all tokens that tie are chosen.
        """
        share = Fraction(str(self.top_entropy_fraction))
        if self.top_entropy_scope == "batch":
            return tokens.largest(tokens.entropies_R, math.ceil(share * tokens.num_present)).double()
        return entropy_groups(tokens.entropies_R, tokens.responses_R, upper_shares=[share]).double()

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
