"""Lay sequences end to end in rows of equal length, dealt over data-parallel ranks.

A tiny model is bound by the latency of its collectives and a large one by its matrix products: both want few, long
rows. Rows depend on lengths alone, so the rows that score a mini-batch are the rows that train it.

Legend: T tokens of one row, padding included, N sequences of one row, B responses of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_rl.data.types import Batch, token_positions
from megatron_rl.errors import ConfigError


@dataclass(frozen=True)
class RowRules:
    """What a row must satisfy.

    Attributes:
        tokens: most tokens in a row (longer only if one sequence alone is longer: that is an error).
        sequence_multiple: each sequence is padded to a multiple of this (zig-zag context parallelism).
        row_multiple: each row is padded to a multiple of this (sequence parallelism).
        count_multiple: the number of rows is padded to a multiple of this (data and pipeline parallelism).
        one_each: one sequence a row instead of packing.
    """

    tokens: int
    sequence_multiple: int = 1
    row_multiple: int = 1
    count_multiple: int = 1
    one_each: bool = False


@dataclass(frozen=True)
class Row:
    """Sequences laid end to end, then padding.

    Attributes:
        batch: the mini-batch that the row was made from.
        sequences: the row's sequences, as indices into the batch.
        padded_N: int64, the padded length of each sequence.
        length: positions of the row, the same for all rows of a mini-batch.
    """

    batch: Batch
    sequences: tuple[int, ...]
    padded_N: Tensor
    length: int

    @cached_property
    def lengths_N(self) -> Tensor:
        """Int64 [N]: real tokens of each sequence."""
        return self.batch.lengths_B[torch.tensor(self.sequences, dtype=torch.int64)]

    @cached_property
    def token_ids_T(self) -> Tensor:
        """Int64 [T]: index in the batch of the token at each position, -1 at padding."""
        index_T = torch.full((self.length,), -1, dtype=torch.int64)
        row_starts_N = self.padded_N.cumsum(0) - self.padded_N
        batch_starts_N = self.batch.starts_B[torch.tensor(self.sequences, dtype=torch.int64)]
        index_T[token_positions(row_starts_N, self.lengths_N)] = token_positions(batch_starts_N, self.lengths_N)
        return index_T

    @cached_property
    def target_ids_T(self) -> Tensor:
        """Int64 [T]: which token of the batch each position predicts (the next of its sequence), -1 for none."""
        here, following = self.token_ids_T[:-1], self.token_ids_T[1:]
        target_T = torch.full_like(self.token_ids_T, -1)
        target_T[:-1] = torch.where((here >= 0) & (following == here + 1) & ~self._starts_T[1:], following, -1)
        return target_T

    @cached_property
    def _starts_T(self) -> Tensor:
        starts_T = torch.zeros(self.length, dtype=torch.bool)
        starts_T[(self.padded_N.cumsum(0) - self.padded_N)] = True
        return starts_T


def pack(batch: Batch, rules: RowRules) -> list[Row]:
    """Return the batch as rows of one common length, as few and as even as the token budget allows.

    Raises:
        ConfigError: a sequence does not fit in a row.
    """
    padded_B = _round_up(batch.lengths_B, rules.sequence_multiple)
    longest = int(padded_B.max()) if len(batch) else 0
    if longest > rules.tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens (padded) does not fit in a row of {rules.tokens}; "
            f"set train.tokens_per_microbatch to at least {longest}, or shorten rollout.sampling.max_new_tokens"
        )
    bins = [[index] for index in range(len(batch))] if rules.one_each else _even_bins(padded_B.tolist(), rules)
    while len(bins) % rules.count_multiple or not bins:
        bins.append([])
    length = max(int(padded_B[b].sum()) for b in bins)
    length = int(_round_up(torch.tensor(max(length, 1)), rules.row_multiple))
    return [Row(batch, tuple(b), padded_B[torch.tensor(b, dtype=torch.int64)], length) for b in bins]


def one_row(batch: Batch, rules: RowRules) -> list[Row]:
    """Return the whole batch as one row, as many times as the mesh asks for rows; no budget applies.

    Copies, not empty rows: a load-balancing loss, which is undefined for an empty row, would look like a finding.
    """
    padded_N = _round_up(batch.lengths_B, rules.sequence_multiple)
    length = int(_round_up(padded_N.sum().clamp(min=1), rules.row_multiple))
    return [Row(batch, tuple(range(len(batch))), padded_N, length)] * rules.count_multiple


def _even_bins(lengths: Sequence[int], rules: RowRules) -> list[list[int]]:
    """Deal sequences, longest first, each into the emptiest row; use more rows until all fit the budget."""
    multiple = rules.count_multiple
    count = -(-max(sum(lengths), 1) // rules.tokens)
    count = -(-count // multiple) * multiple
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in order:
            emptiest = loads.index(min(loads))
            bins[emptiest].append(index)
            loads[emptiest] += lengths[index]
        if max(loads) <= rules.tokens:
            return [sorted(b) for b in bins]
        count += multiple


def _round_up(values: Tensor, multiple: int) -> Tensor:
    return (values + multiple - 1) // multiple * multiple
