"""A mini-batch whose tokens are distributed over data-parallel replicas, each of which holds its own responses.

    outline, on every rank     per-response columns of all responses: lengths, advantages, rewards, ids
    -> MinibatchPlan           the packed rows, and so which replica owns which response; the same on every rank
    -> Minibatch, per replica  all columns of the responses in its own rows

Legend: T tokens, B responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.data.pack import Packing, Row
from megatron_rl.data.types import Batch


@dataclass(frozen=True)
class Minibatch(Batch):
    """The responses of a mini-batch that one data-parallel replica owns, in the order of the mini-batch.

    Attributes:
        whole: the outline of the mini-batch: the per-response columns of all replicas' responses.
        owned_B: int64, index within the mini-batch of each response.
        rows: the rows of this replica; their indices are those of this batch.
        num_rows: number of rows over all replicas.
        has_empty_rows: whether any replica has a row without sequences.
    """

    whole: Batch
    owned_B: Tensor
    rows: Sequence[Row]
    num_rows: int
    has_empty_rows: bool


@dataclass(frozen=True)
class MinibatchPlan:
    """The outline of a mini-batch and its packed rows, for one of several data-parallel replicas.

    Attributes:
        outline: the per-response columns of all responses.
        packing: the rows of all replicas.
        replica: index of this rank's replica.
        replicas: number of replicas.
    """

    outline: Batch
    packing: Packing
    replica: int
    replicas: int

    def owned(self, replica: int | None = None) -> Tensor:
        """Return the indices of the responses that a replica owns, int64, ascending; None: this rank's replica."""
        return self.packing.owned(self.replica if replica is None else replica, self.replicas)

    def minibatch(self, batch: Batch) -> Minibatch:
        """Return the mini-batch of this rank's replica from a batch of the responses ``owned()``, in this order."""
        return Minibatch(
            batch.lengths_B,
            batch.columns,
            whole=self.outline,
            owned_B=self.owned(),
            rows=self.packing.rows(self.replica, self.replicas),
            num_rows=len(self.packing.bins),
            has_empty_rows=not all(self.packing.bins),
        )


def in_outline(minibatch: Minibatch, column_T: Tensor) -> Tensor:
    """Return a column over all tokens of the mini-batch that has ``column_T`` at this replica's tokens and 0 elsewhere.

    The sum over replicas is the whole column: for tests and tools, which compare layouts.
    """
    whole = minibatch.whole
    whole_T = column_T.new_zeros(int(whole.lengths_B.sum()), *column_T.shape[1:])
    whole_T[whole.token_positions(minibatch.owned_B)] = column_T
    return whole_T


def joined(minibatches: Sequence[Minibatch], name: str) -> Tensor:
    """Return the values of a per-token column at the trained tokens of several mini-batches, concatenated."""
    return torch.cat([minibatch[name][minibatch.trained_R] for minibatch in minibatches])
