"""Mini-batches of a single replica, for tests without a policy, and whole columns, for tests with several."""

from torch import Tensor

from megatron_rl.data.minibatch import Minibatch, MinibatchPlan, in_outline
from megatron_rl.data.pack import RowRules, one_row
from megatron_rl.data.types import Batch, Columns
from megatron_rl.policy.engine import Policy


def alone(batch: Batch) -> Minibatch:
    """Return the batch as a mini-batch that one replica owns whole, in one row."""
    return MinibatchPlan(batch.outline(), one_row(batch.lengths_B, RowRules(1)), 0, 1).minibatch(batch)


def whole(policy: Policy, minibatch: Minibatch, columns: Columns) -> dict[str, Tensor]:
    """Return per-token columns of this replica's tokens over all tokens of the mini-batch. Collective."""
    return {name: policy.total(in_outline(minibatch, column)) for name, column in columns.items()}
