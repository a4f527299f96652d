"""Segments (sets of tokens that share one importance ratio) and their importance ratios.

Legend: R trained tokens (of a mini-batch, or those of a micro-batch on this rank), N those of a whole row, B responses.

Segment ids are only compared for equality: they need not be dense, and the tokens of a segment need not be adjacent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from megatron_rl.algorithms.finite import LARGEST_EXPONENT
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.vocabulary import Granularity, Vocabulary
from megatron_rl.distributed.collectives import sum_over
from megatron_rl.errors import ConfigError


@dataclass(frozen=True)
class Ratio:
    """The importance ratio of each token's segment g: s_g = exp(mean of the token log ratios in g).

    Attributes:
        token_log_R: log ratio of each token, with gradient.
        log_R: log s_g of the token's segment, without gradient.
        shares_R: 1 / n_g with n_g the tokens of the segment, float64; the sum over all ranks is the number of segments.
    """

    token_log_R: Tensor
    log_R: Tensor
    shares_R: Tensor

    @property
    def value_R(self) -> Tensor:
        """The ratio s_g of each token's segment, at most exp(20), without gradient."""
        return self.log_R.clamp(max=LARGEST_EXPONENT).exp()

    def live(self, active_R: Tensor) -> Tensor:
        """Return sg[s_g] * exp(x_t - sg[x_t]), with sg the stop-gradient and x_t the token log ratio.

        The value is s_g and the gradient is s_g times that of x_t (GSPO-token, arXiv 2507.18071), with s_g at most
        exp(20). Where ``active_R`` (bool) is False the value is 1 and the gradient is 0.
        """
        token_log_R = torch.where(active_R, self.token_log_R, 0)
        return torch.where(active_R, self.value_R, 1) * torch.exp(token_log_R - token_log_R.detach())


def segment_ratio(token_log_R: Tensor, inputs: LossInputs) -> Ratio:
    """Return the geometric mean of the token ratios over each segment, across all ranks that share the row.

    The log ratios are averaged in float64 with one all-reduce of (sum, count) per segment. Without ``segment_ids_R``
    every token is a segment, and no communication takes place.

    Args:
        token_log_R: log ratio of each trained token on this rank, float32 or float64.
        inputs: its ``segment_ids_R`` assign each token to a segment of the row.
    """
    detached_R = token_log_R.detach()
    if inputs.segment_ids_R is None:
        return Ratio(token_log_R, detached_R, torch.ones_like(detached_R, dtype=torch.float64))
    sums = detached_R.new_zeros(2, inputs.num_segments, dtype=torch.float64)
    values = torch.stack((detached_R.double(), torch.ones_like(detached_R, dtype=torch.float64)))
    sums.index_add_(1, inputs.segment_ids_R, values)
    totals, counts = sum_over(inputs.context_group, sums)[:, inputs.segment_ids_R]
    return Ratio(token_log_R, (totals / counts).to(detached_R.dtype), 1 / counts)


def prefix_minima(values_R: Tensor, index_R: Tensor, inputs: LossInputs) -> Tensor:
    """Return the smallest value among the earlier trained tokens of each token's response, +inf for the first one, [R].

    One all-reduce of two numbers per trained token of the row over the ranks that share it, without gradient.

    Args:
        values_R: one value per trained token on this rank.
        index_R: index of the token among the trained tokens of its response.
        inputs: its ``segment_ids_R`` number the trained tokens of the row in order: every token is a segment.

    Raises:
        ConfigError: the inputs have no segment ids.
    """
    places_R = inputs.require("segment_ids_R")
    row = values_R.new_zeros(2, inputs.num_segments)
    row.index_copy_(1, places_R, torch.stack((values_R, index_R.to(values_R.dtype))))
    values_N, index_N = sum_over(inputs.context_group, row)
    infinite_N = torch.full_like(values_N, torch.inf)
    minima_N = torch.where(index_N > 0, values_N.roll(1), infinite_N)
    reach = 1  # the minimum is over this many earlier tokens so far
    while reach < inputs.num_segments:
        minima_N = torch.minimum(minima_N, torch.where(index_N > reach, minima_N.roll(reach), infinite_N))
        reach *= 2
    return minima_N[places_R]


def segment_means(values_R: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every token its segment's mean of ``values_R``, float64 [R], and its segment's size, int64 [R]."""
    unique, dense_R = torch.unique(ids_R, return_inverse=True)
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, dense_R, values_R.double())
    counts = torch.bincount(dense_R, minlength=len(unique))
    return (sums / counts)[dense_R], counts[dense_R]


def segments_per_response(ids_R: Tensor, responses_R: Tensor) -> Tensor:
    """Return for every token the number of segments of its response, int64 [R]."""
    pairs = torch.unique(torch.stack((responses_R, ids_R)), dim=1)
    return torch.bincount(pairs[0])[responses_R]


def joint_ids(responses_R: Tensor, ids_R: Tensor) -> Tensor:
    """Return ids that are unique per (response, id) pair, int64 [R]: dense from 0, in the order of the pairs."""
    return torch.unique(torch.stack((responses_R, ids_R)), dim=1, return_inverse=True)[1]


def entropy_groups(
    entropies_R: Tensor, responses_R: Tensor, *, upper_shares: Sequence[Fraction] = (), thresholds: Sequence[float] = ()
) -> Tensor:
    """Return the entropy range of each token, int64 [R], 0 for the lowest (the groups tau_k of arXiv 2512.00499).

    Args:
        entropies_R: entropies in nats.
        responses_R: index of the response that each token belongs to.
        upper_shares: for each boundary, the share of a response's N tokens above it: the ``ceil(share * N)`` tokens of
            highest entropy; among equal entropies, earlier positions rank higher. Exact fractions, because in floating
            point ceil(0.07 * 100) is 8.
        thresholds: boundaries in nats, used instead of ``upper_shares``; a token exactly at a boundary is above it.
    """
    if thresholds:
        borders = torch.tensor(sorted(thresholds), dtype=entropies_R.dtype)
        return torch.bucketize(entropies_R, borders, right=True)
    ranks_R, counts_R = _descending_ranks(entropies_R, responses_R)
    groups_R = torch.zeros_like(responses_R)
    for share in upper_shares:
        sizes_R = (counts_R * share.numerator + share.denominator - 1) // share.denominator
        groups_R += ranks_R < sizes_R
    return groups_R


def _descending_ranks(values_R: Tensor, responses_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's rank in its response (0: largest value; ties in order) and the response's size, int64 [R]."""
    by_value = torch.argsort(values_R, descending=True, stable=True)
    order = by_value[torch.argsort(responses_R[by_value], stable=True)]
    sizes_B = torch.bincount(responses_R)
    starts_B = sizes_B.cumsum(0) - sizes_B
    ranks_R = torch.empty_like(responses_R)
    ranks_R[order] = torch.arange(len(order)) - starts_B[responses_R[order]]
    return ranks_R, sizes_B[responses_R]


@dataclass(frozen=True)
class TokenRun:
    """Ids and positions of the trained tokens of a mini-batch, for finding sentences.

    Attributes:
        input_ids_R: token ids.
        positions_R: positions among all tokens of the batch.
        responses_R: index of the response that each token belongs to.
    """

    input_ids_R: Tensor
    positions_R: Tensor
    responses_R: Tensor

    @property
    def joined_R(self) -> Tensor:
        """Bool [R]: the next trained token is the next token of the same response."""
        joined = torch.zeros(len(self.positions_R), dtype=torch.bool)
        joined[:-1] = (self.positions_R.diff() == 1) & (self.responses_R.diff() == 0)
        return joined


def sentence_ids(run: TokenRun, vocabulary: Vocabulary, granularity: Granularity, min_tokens: int = 1) -> Tensor:
    """Return the sentence or subsentence of each trained token, int64 [R], numbered from 0 over the mini-batch.

    A segment ends at a token with a delimiter (``Vocabulary.boundaries``), except at a ``.`` or ``,`` between digits,
    and before a gap of untrained tokens. An end-of-sequence token belongs to the segment that precedes it. A segment
    shorter than ``min_tokens`` is merged into the next one.
    """
    if not len(run.input_ids_R):
        return torch.zeros(0, dtype=torch.int64)
    table = vocabulary.boundaries(granularity)
    ids_R, joined_R = run.input_ids_R, run.joined_R
    follows_R = torch.zeros_like(joined_R)
    follows_R[1:] = joined_R[:-1]
    next_ids_R, previous_ids_R = ids_R.roll(-1), ids_R.roll(1)
    closes_R = table.closes_V[ids_R].clone()
    for index in table.continues_V[ids_R].nonzero().squeeze(1).tolist():
        closes_R[index] = vocabulary.closes(_tail(run, follows_R, index), granularity)
    digit_before_R = table.digit_before_V[ids_R] | (
        table.bare_V[ids_R] & follows_R & table.ends_in_digit_V[previous_ids_R]
    )
    closes_R &= ~(digit_before_R & joined_R & table.starts_with_digit_V[next_ids_R])
    closes_R &= ~(joined_R & table.ends_sequence_V[next_ids_R])
    if min_tokens > 1:
        closes_R = _merge_short(closes_R, ~joined_R, min_tokens)
    ends_R = closes_R | ~joined_R
    return ends_R.long().cumsum(0) - ends_R.long()


def _tail(run: TokenRun, follows_R: Tensor, index: int) -> list[int]:
    """Return the id at ``index`` and up to three adjacent ids before it, enough to complete a split UTF-8 character."""
    start = index
    while start > 0 and index - start < 3 and bool(follows_R[start]):
        start -= 1
    return run.input_ids_R[start : index + 1].tolist()


def _merge_short(closes_R: Tensor, gaps_R: Tensor, min_tokens: int) -> Tensor:
    """Return ``closes_R`` without the ends of segments that have fewer than ``min_tokens`` tokens."""
    merged: list[bool] = []
    length = 0
    for closes, gap in zip(closes_R.tolist(), gaps_R.tolist(), strict=True):
        length += 1
        merged.append(closes and length >= min_tokens)
        if gap or merged[-1]:
            length = 0
    return torch.tensor(merged)


def log_size(vocabulary: Vocabulary | None) -> float:
    """Return log V, the entropy of the uniform distribution over the vocabulary, in nats.

    Raises:
        ConfigError: the vocabulary is None or has fewer than two token ids.
    """
    if vocabulary is None or vocabulary.size < 2:
        raise ConfigError(f"log V needs the size of the model's vocabulary, got {vocabulary}: set vocab_size")
    return math.log(vocabulary.size)
