"""The experts that the engine chose, as columns of a batch.

Legend: T tokens, L layers with experts, K experts per token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rl.config.schema import Run
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Columns, Response
from megatron_rl.errors import RolloutError
from megatron_rl.models.hf_mapping import family_of, read_hf_config


def requested_routes(run: Run) -> RouteShape | None:
    """Return the shape of the routing record to request from the engine; None: no record is needed."""
    if run.rollout.routing_replay not in ("report", "r3"):
        return None
    return family_of(read_hf_config(Path(run.model.path))).route_shape


def route_columns(responses: Sequence[Response], lengths: Sequence[int], shape: RouteShape) -> Columns:
    """Return ``rollout_routes_T`` [T, L, K], and ``rollout_routed_T`` [T], True where the engine returned its choice.

    Raises:
        RolloutError: no response has a routing record.
    """
    if responses and all(response.routes is None for response in responses):
        raise RolloutError(
            "rollout.routing_replay needs the experts that the engine chose, and no server returned any; start SGLang"
            " with --enable-return-routed-experts, or set rollout.routing_replay to r2 or none"
        )
    dtype = getattr(torch, shape.dtype)
    routes_TLK = torch.zeros(sum(lengths), *shape.trailing_shape, dtype=dtype)
    routed_T = torch.zeros(sum(lengths), dtype=torch.bool)
    start = 0
    for response, length in zip(responses, lengths, strict=True):
        if response.routes is not None:
            routes_TLK[start : start + length - 1] = response.routes
            routed_T[start : start + length - 1] = True
        start += length
    return {"rollout_routes_T": routes_TLK, "rollout_routed_T": routed_T}
