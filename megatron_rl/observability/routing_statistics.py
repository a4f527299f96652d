"""How often the rollout engine and the trainer chose different experts.

Legend: T tokens of a batch.
"""

import torch
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.observability.mismatch_causes import RoutingDifferences


def routing(batch: Batch) -> RoutingDifferences | None:
    """Return how often engine and trainer chose different experts, over tokens with a routing record; None: unknown."""
    if "routing_differs_T" not in batch:
        return None
    differs_T: Tensor = batch["routing_differs_T"][batch["rollout_routed_T"]].double()
    if not len(differs_T):
        return None
    layers = batch["rollout_routes_T"].shape[1]
    return RoutingDifferences(float((differs_T > 0).double().mean()), float(differs_T.mean()) / layers)


def missing_routes(batch: Batch) -> int | None:
    """Return how many tokens lack a routing record, each sequence's last aside; None if no records were requested."""
    if "rollout_routed_T" not in batch:
        return None
    needed_T = torch.ones(len(batch["rollout_routed_T"]), dtype=torch.bool)
    needed_T[batch.starts_B + batch.lengths_B - 1] = False
    return int((needed_T & ~batch["rollout_routed_T"]).sum())
