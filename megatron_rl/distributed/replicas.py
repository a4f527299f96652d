"""Reductions over data-parallel replicas: counts, sums, maxima and records that each replica computes for its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.distributed.collectives import RankGroup, gather_json, group_rank, group_size, max_over, sum_over

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Replicas:
    """The data-parallel replicas as seen by one rank. Every method is collective over the ranks of ``group``.

    Tensors are in host memory. Without a group there is one replica.

    Attributes:
        group: one rank of each replica, at the same place within it; a gloo group.
    """

    group: RankGroup = None

    @property
    def index(self) -> int:
        """Index of this rank's replica."""
        return group_rank(self.group)

    @property
    def count(self) -> int:
        """Number of replicas."""
        return group_size(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum; integer sums are exact."""
        return sum_over(self.group, values)

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum."""
        return max_over(self.group, values)

    def gather(self, value: object) -> list[object]:
        """Return the JSON value of every replica, in order."""
        return [value] if self.count == 1 else gather_json(value, CPU, self.group)
