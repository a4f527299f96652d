"""How often the rollout engine and the trainer chose different experts.

Legend: T tokens of a mini-batch on this replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.data.minibatch import Minibatch
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.observability.mismatch_causes import RoutingDifferences


@dataclass(frozen=True)
class RoutingCounts:
    """Counts of compared routes over all replicas.

    Attributes:
        compared: tokens with a record of the engine's choice.
        differing: those with a different choice in any layer.
        differing_layers: (token, layer) pairs with a different choice.
        missing: tokens without a record, except the last of each sequence, which the engine never processes.
        layers: number of the model's layers with experts.
    """

    compared: int
    differing: int
    differing_layers: int
    missing: int
    layers: int

    @property
    def differences(self) -> RoutingDifferences | None:
        """The counts as fractions; None without records."""
        if not self.compared:
            return None
        by_layer = self.differing_layers / self.compared / self.layers
        return RoutingDifferences(self.differing / self.compared, by_layer)


def routing_counts(minibatches: Sequence[Minibatch], replicas: Replicas, layers: int) -> RoutingCounts | None:
    """Return how often engine and trainer chose different experts; None if that is unknown. Collective.

    Args:
        minibatches: this replica's parts of the step's mini-batches.
        replicas: the replicas that hold the other parts.
        layers: number of the model's layers with experts.
    """
    if any("routing_differs_T" not in minibatch for minibatch in minibatches):
        return None
    counts = torch.stack([_counts(minibatch) for minibatch in minibatches]).sum(0)
    compared, differing, differing_layers, missing = replicas.sum(counts).tolist()
    return RoutingCounts(compared, differing, differing_layers, missing, layers)


def _counts(minibatch: Minibatch) -> Tensor:
    routed_T = minibatch["rollout_routed_T"]
    differs_T: Tensor = minibatch["routing_differs_T"][routed_T].long()
    needed_T = torch.ones(len(routed_T), dtype=torch.bool)
    needed_T[minibatch.starts_B + minibatch.lengths_B - 1] = False
    return torch.stack([routed_T.sum(), (differs_T > 0).sum(), differs_T.sum(), (needed_T & ~routed_T).sum()])
