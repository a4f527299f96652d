"""How often the rollout engine and the trainer chose different experts.

Legend: T tokens of all sequences of a batch.
"""

import torch
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.observability.mismatch_causes import Routing


def routing(batch: Batch) -> Routing | None:
    """Return how often engine and trainer chose other experts, over the tokens that have a record; None: not known."""
    if "routing_differs_T" not in batch:
        return None
    differs_T: Tensor = batch["routing_differs_T"][batch["rollout_routed_T"]].double()
    if not len(differs_T):
        return None
    layers = batch["rollout_routes_T"].shape[1]
    return Routing(float((differs_T > 0).double().mean()), float(differs_T.mean()) / layers)


def missing_routes(batch: Batch) -> int | None:
    """Return the tokens without a record that should have one: all but each sequence's last. None: none was asked."""
    if "rollout_routed_T" not in batch:
        return None
    needed_T = torch.ones(len(batch["rollout_routed_T"]), dtype=torch.bool)
    needed_T[batch.starts_B + batch.lengths_B - 1] = False
    return int((needed_T & ~batch["rollout_routed_T"]).sum())
