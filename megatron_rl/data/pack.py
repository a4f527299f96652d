"""Packing of sequences into rows of equal length, which are distributed over data-parallel replicas.

Few long rows are efficient for small models, which are bound by the latency of collectives, and for large models, which
are bound by matrix products. Rows depend only on sequence lengths, so every rank computes the same rows without
communication, and the forward pass that computes log-probs and the training pass of a mini-batch use the same rows.

Legend: T tokens of one row, padding included, N sequences of one row, B responses of the mini-batch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_rl.data.types import token_positions
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
        balanced_replicas: distribute rows so that this many data-parallel replicas have even costs of attention; 1: in
            the order of packing.
    """

    tokens: int
    sequence_multiple: int = 1
    row_multiple: int = 1
    count_multiple: int = 1
    one_sequence_per_row: bool = False
    balanced_replicas: int = 1


@dataclass(frozen=True)
class Row:
    """A packed row: concatenated sequences, each padded, followed by padding.

    Attributes:
        sequences: indices of the row's sequences in the batch that holds their tokens.
        starts_N: int64, position of each sequence's first token among all tokens of that batch.
        lengths_N: int64, length of each sequence in tokens, without padding.
        padded_N: int64, padded length of each sequence in tokens.
        length: length of the row in tokens, the same for all rows of a mini-batch.
    """

    sequences: tuple[int, ...]
    starts_N: Tensor
    lengths_N: Tensor
    padded_N: Tensor
    length: int

    @cached_property
    def token_ids_T(self) -> Tensor:
        """Int64 [T]: batch index of each position's token, -1 at padding."""
        row_starts_N = self.padded_N.cumsum(0) - self.padded_N
        index_T = torch.full((self.length,), -1, dtype=torch.int64)
        index_T[token_positions(row_starts_N, self.lengths_N)] = token_positions(self.starts_N, self.lengths_N)
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


@dataclass(frozen=True)
class Packing:
    """The rows of a whole mini-batch; row r belongs to data-parallel replica r modulo the number of replicas.

    Attributes:
        lengths_B: int64, length of each sequence of the mini-batch in tokens.
        padded_B: int64, padded lengths.
        bins: indices of the sequences of each row, ascending within a row.
        length: length of every row in tokens.
    """

    lengths_B: Tensor
    padded_B: Tensor
    bins: tuple[tuple[int, ...], ...]
    length: int

    def owned(self, replica: int, replicas: int) -> Tensor:
        """Return the indices of the sequences in the replica's rows, ascending, int64."""
        return torch.tensor(sorted({index for b in self.bins[replica::replicas] for index in b}), dtype=torch.int64)

    def rows(self, replica: int, replicas: int) -> list[Row]:
        """Return the replica's rows, whose indices are those of a batch of its ``owned`` sequences."""
        owned_B = self.owned(replica, replicas)
        lengths_B = self.lengths_B[owned_B]
        starts_B = lengths_B.cumsum(0) - lengths_B
        rows = []
        for members in self.bins[replica::replicas]:
            local_N = torch.searchsorted(owned_B, torch.tensor(members, dtype=torch.int64))
            padded_N = self.padded_B[list(members)]
            rows.append(Row(tuple(local_N.tolist()), starts_B[local_N], lengths_B[local_N], padded_N, self.length))
        return rows


def pack(lengths_B: Tensor, rules: RowRules) -> Packing:
    """Pack sequences of these lengths into rows of equal length: few rows, with balanced numbers of tokens.

    Args:
        lengths_B: int64, length of each sequence in tokens.
        rules: maximum number of tokens per row, and multiples for padding.

    Returns:
        The rows; rows without sequences are appended until their number is a multiple of ``rules.count_multiple``.

    Raises:
        ConfigError: a sequence does not fit in a row.
    """
    padded_B = _round_up(lengths_B, rules.sequence_multiple)
    longest = int(padded_B.max()) if len(padded_B) else 0
    if longest > rules.tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens (padded) does not fit in a row of {rules.tokens}; "
            f"set train.tokens_per_microbatch to at least {longest}, or shorten rollout.sampling.max_new_tokens"
        )
    padded = padded_B.tolist()
    bins = [[index] for index in range(len(padded))] if rules.one_sequence_per_row else _even_bins(padded, rules)
    while len(bins) % rules.count_multiple or not bins:
        bins.append([])
    if rules.balanced_replicas > 1:
        bins = _balanced(bins, padded, rules.balanced_replicas)
    length = max(sum(padded[index] for index in b) for b in bins)
    length = int(_round_up(torch.tensor(max(length, 1)), rules.row_multiple))
    return Packing(lengths_B, padded_B, tuple(map(tuple, bins)), length)


def one_row(lengths_B: Tensor, rules: RowRules) -> Packing:
    """Pack all sequences into one row of any length and repeat it ``rules.count_multiple`` times.

    Every replica owns all sequences. The row is repeated instead of adding empty rows, because some quantities (such as
    a load-balancing loss) are undefined for an empty row.
    """
    padded_B = _round_up(lengths_B, rules.sequence_multiple)
    length = int(_round_up(padded_B.sum().clamp(min=1), rules.row_multiple))
    return Packing(lengths_B, padded_B, (tuple(range(len(lengths_B))),) * rules.count_multiple, length)


def _even_bins(lengths: Sequence[int], rules: RowRules) -> list[list[int]]:
    """Assign sequences, longest first, to the row with the fewest tokens; add rows until all of them fit.

    Among rows with equally many tokens, the first is taken. An attempt ends at the first sequence that does not fit.
    """
    count = -(-max(sum(lengths), 1) // rules.tokens)
    count = -(-count // rules.count_multiple) * rules.count_multiple
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while (bins := _fill(lengths, order, count, rules.tokens)) is None:
        count += rules.count_multiple
    return [sorted(b) for b in bins]


def _fill(lengths: Sequence[int], order: Sequence[int], count: int, most: int) -> list[list[int]] | None:
    """Return the sequences of ``count`` rows, or None if a row would have more than ``most`` tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in order:
        load, number = heap[0]
        if load + lengths[index] > most:
            return None
        bins[number].append(index)
        heapq.heapreplace(heap, (load + lengths[index], number))
    return bins


def _balanced(bins: Sequence[list[int]], lengths: Sequence[int], replicas: int) -> list[list[int]]:
    """Return the rows in another order: rows at the same place of all replicas cost alike, and so do whole replicas.

    All rows have equal length, so that their linear layers cost the same. Attention costs the square of each sequence's
    length. The costliest rows come first; of the rows at one place the costliest goes to the replica with the least.
    """
    costs = [sum(lengths[index] ** 2 for index in b) for b in bins]
    order = sorted(range(len(bins)), key=lambda number: (-costs[number], number))
    loads = [0] * replicas
    balanced: list[list[int]] = []
    for start in range(0, len(order), replicas):
        places = sorted(range(replicas), key=lambda replica: (loads[replica], replica))
        row_of = dict(zip(places, order[start : start + replicas], strict=True))
        for replica in range(replicas):
            loads[replica] += costs[row_of[replica]]
            balanced.append(list(bins[row_of[replica]]))
    return balanced


def _round_up(values: Tensor, multiple: int) -> Tensor:
    return (values + multiple - 1) // multiple * multiple
