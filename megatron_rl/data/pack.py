"""Packing of sequences into rows of equal length, which are distributed over data-parallel ranks.

Few long rows are efficient for small models, which are bound by the latency of collectives, and for large models, which
are bound by matrix products. Rows depend only on sequence lengths, so the forward pass that computes log-probs and the
training pass of a mini-batch use the same rows.

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
    """Constraints on packed rows.

    Attributes:
        tokens: maximum number of tokens per row; a longer sequence is an error.
        sequence_multiple: each sequence is padded to a multiple of this (zig-zag context parallelism).
        row_multiple: each row is padded to a multiple of this (sequence parallelism).
        count_multiple: the number of rows is padded to a multiple of this (data and pipeline parallelism).
        one_sequence_per_row: put one sequence in each row instead of packing.
    """

    tokens: int
    sequence_multiple: int = 1
    row_multiple: int = 1
    count_multiple: int = 1
    one_sequence_per_row: bool = False


@dataclass(frozen=True)
class Row:
    """A packed row: concatenated sequences, each padded, followed by padding.

    Attributes:
        batch: the mini-batch that contains the sequences.
        sequences: indices of the row's sequences in the batch.
        padded_N: int64, padded length of each sequence in tokens.
        length: length of the row in tokens, the same for all rows of a mini-batch.
    """

    batch: Batch
    sequences: tuple[int, ...]
    padded_N: Tensor
    length: int

    @cached_property
    def lengths_N(self) -> Tensor:
        """Int64 [N]: length of each sequence in tokens, without padding."""
        return self.batch.lengths_B[torch.tensor(self.sequences, dtype=torch.int64)]

    @cached_property
    def token_ids_T(self) -> Tensor:
        """Int64 [T]: batch index of the token at each position, -1 at padding."""
        index_T = torch.full((self.length,), -1, dtype=torch.int64)
        row_starts_N = self.padded_N.cumsum(0) - self.padded_N
        batch_starts_N = self.batch.starts_B[torch.tensor(self.sequences, dtype=torch.int64)]
        index_T[token_positions(row_starts_N, self.lengths_N)] = token_positions(batch_starts_N, self.lengths_N)
        return index_T

    @cached_property
    def target_ids_T(self) -> Tensor:
        """Int64 [T]: batch index of the token that each position predicts (the next of its sequence), or -1."""
        current, following = self.token_ids_T[:-1], self.token_ids_T[1:]
        target_T = torch.full_like(self.token_ids_T, -1)
        target_T[:-1] = torch.where((current >= 0) & (following == current + 1) & ~self._starts_T[1:], following, -1)
        return target_T

    @cached_property
    def _starts_T(self) -> Tensor:
        starts_T = torch.zeros(self.length, dtype=torch.bool)
        starts_T[(self.padded_N.cumsum(0) - self.padded_N)] = True
        return starts_T


def pack(batch: Batch, rules: RowRules) -> list[Row]:
    """Pack a batch into rows of equal length: few rows, with balanced numbers of tokens.

    Args:
        batch: the mini-batch.
        rules: maximum number of tokens per row, and multiples for padding.

    Returns:
        The rows; rows without sequences are appended until their number is a multiple of ``rules.count_multiple``.

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
    bins = (
        [[index] for index in range(len(batch))] if rules.one_sequence_per_row else _even_bins(padded_B.tolist(), rules)
    )
    while len(bins) % rules.count_multiple or not bins:
        bins.append([])
    length = max(int(padded_B[b].sum()) for b in bins)
    length = int(_round_up(torch.tensor(max(length, 1)), rules.row_multiple))
    return [Row(batch, tuple(b), padded_B[torch.tensor(b, dtype=torch.int64)], length) for b in bins]


def one_row(batch: Batch, rules: RowRules) -> list[Row]:
    """Pack the whole batch into one row of any length and return ``rules.count_multiple`` references to it.

    The row is repeated instead of adding empty rows, because some quantities (such as a load-balancing loss) are
    undefined for an empty row.
    """
    padded_N = _round_up(batch.lengths_B, rules.sequence_multiple)
    length = int(_round_up(padded_N.sum().clamp(min=1), rules.row_multiple))
    return [Row(batch, tuple(range(len(batch))), padded_N, length)] * rules.count_multiple


def _even_bins(lengths: Sequence[int], rules: RowRules) -> list[list[int]]:
    """Assign sequences, longest first, to the row with the fewest tokens; add rows until all of them fit."""
    multiple = rules.count_multiple
    count = -(-max(sum(lengths), 1) // rules.tokens)
    count = -(-count // multiple) * multiple
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in order:
            shortest = loads.index(min(loads))
            bins[shortest].append(index)
            loads[shortest] += lengths[index]
        if max(loads) <= rules.tokens:
            return [sorted(b) for b in bins]
        count += multiple


def _round_up(values: Tensor, multiple: int) -> Tensor:
    return (values + multiple - 1) // multiple * multiple
