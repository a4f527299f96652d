"""Routing replay: reuse the experts that were chosen in one pass in another pass.

    none     every pass uses its own routing
    report   as none, and the engine's choices are compared with the trainer's
    r2       ``forward_backward`` takes the experts that ``compute_logprobs`` chose, whatever rounding does
    r3       both passes take the experts that the engine chose (rollout routing replay)

Only the choice is replayed. Gates are computed from the router's scores of the chosen experts, so the router keeps its
gradient. Tokens without a record (padding, and the last token of a sequence, which the engine never processed) are
routed by the live router.

The record is a per-token column of the batch and is sharded like every other column, so layouts, packing and the order
of micro-batches cannot mix tokens up. A rank holds the routes of its own layers only, in the record's integer type, and
copies those of a row to its device once, before the row's forward pass. A layer reads them from the packed row's
description, both in the forward pass and when activations are recomputed.

Legend: T tokens, L layers with experts that this rank has, K experts per token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor, nn

from megatron_rl.config.rollout import RoutingReplay
from megatron_rl.data.columns import ROUTE_COLUMNS
from megatron_rl.data.types import Batch, Columns, values_at
from megatron_rl.distributed.collectives import group_rank, group_size, sum_over
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.errors import TrainingError
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.policy.rows import PackedRow, RankRow, RowRoutes
from megatron_rl.policy.upstream import decoder_layers, sort_experts

TopK = Callable[..., tuple[Tensor, Tensor]]


class LayerReplay(RouterReplay):
    """Overrides a router's choice of experts, through megatron-core's replay interface."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        """Index of the layer among the layers with experts that this rank has."""
        self.routes: RowRoutes | None = None
        """The routes of the row that the layer processes now."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and numbers of the experts to take, each [T, K]; scores is [T, experts]."""
        assert default_compute_topk is not None, "megatron-core always gives its own top-k"
        values_TK, live_TK = sort_experts(*default_compute_topk(scores, topk, num_groups, group_topk))
        routes = self.routes
        if routes is None:
            return values_TK, live_TK
        if routes.chosen is not None:
            routes.chosen[self.place] = live_TK.to(torch.int16)
        if not routes.replays:
            return values_TK, live_TK
        record_TK = routes.record_TLK[:, self.place].to(live_TK)
        taken_TK = torch.where(routes.known_T[:, None], record_TK, live_TK)
        return scores.gather(1, taken_TK), taken_TK


class Replay:
    """Attaches recorded routes to rows and gathers the routers' choices."""

    def __init__(
        self, mode: RoutingReplay, chunks: Sequence[DistributedDataParallel], family: Family, mesh: Mesh
    ) -> None:
        self.mode: RoutingReplay = mode if family.num_experts else "none"
        self._mesh = mesh
        self._shape = family.route_shape
        self._recording: list[RowRoutes] | None = None
        self._is_off = False
        config = chunks[0].config
        self._shares_tokens = bool(config.sequence_parallel) and group_size(mesh.tensor) > 1
        self.layers: tuple[int, ...] = self._attach(chunks) if family.num_experts else ()
        """Which of the model's layers with experts this rank has, ascending."""

    def _attach(self, chunks: Sequence[DistributedDataParallel]) -> tuple[int, ...]:
        """Attach a ``LayerReplay`` to every router; return the layers, as indices among those with experts."""
        places = {layer: place for place, layer in enumerate(self._shape.layers)}
        routers: dict[int, tuple[nn.Module, TopKRouter]] = {}
        for _, layers in decoder_layers(chunks):
            for number, layer in layers.items():
                router = getattr(layer.mlp, "router", None)
                if isinstance(router, TopKRouter):
                    routers[places[number]] = (layer, router)
        for place, (layer, router) in enumerate(routers[index] for index in sorted(routers)):
            router.router_replay = LayerReplay(place)
            layer.register_forward_pre_hook(partial(_hand_over, router.router_replay), with_kwargs=True)
        # megatron-core's global list of routers would keep models alive, and is not used here.
        RouterReplay.clear_global_router_replay_instances()
        return tuple(sorted(routers))

    def local_layers(self, batch: Batch) -> Batch:
        """Return the batch with its routes, [T, L, K] of all layers of the model, reduced to this rank's layers."""
        routes = [name for name in ROUTE_COLUMNS if name in batch]
        return batch.add({name: batch[name][:, list(self.layers)] for name in routes})

    def all_layers(self, batch: Batch) -> Batch:
        """Return the batch with the routes of all layers of the model, from all pipeline stages. Collective."""
        whole: dict[str, Tensor] = {}
        for name in (name for name in ROUTE_COLUMNS if name in batch):
            local_TLK = batch[name]
            all_TLK = local_TLK.new_zeros(len(local_TLK), *self._shape.trailing_shape, dtype=torch.int32)
            all_TLK[:, list(self.layers)] = local_TLK.int()
            device = self._mesh.world.device
            whole[name] = sum_over(self._mesh.pipeline, all_TLK.to(device)).to("cpu", local_TLK.dtype)
        return batch.add(whole)

    @contextmanager
    def recording(self) -> Iterator[list[RowRoutes]]:
        """Yield a list to which the routes of every row are appended inside the ``with`` block."""
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Disable replay inside the ``with`` block, as for a reference policy, which has its own routes."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False

    def arm(self, row: RankRow, batch: Batch) -> RankRow:
        """Attach the recorded routes to a row, in host memory, and return the row."""
        if self.mode == "none" or self._is_off:
            return row
        name = "routes_T" if self.mode == "r2" else "rollout_routes_T"
        local_T = row.token_ids_T
        if self._shares_tokens:
            local_T = local_T.chunk(group_size(self._mesh.tensor))[group_rank(self._mesh.tensor)]
        record_TLK, known_T = self._empty(len(local_T)), torch.zeros(len(local_T), dtype=torch.bool)
        if name in batch:
            if batch[name].shape[1:] != record_TLK.shape[1:]:
                found, expected = list(batch[name].shape[1:]), list(record_TLK.shape[1:])
                raise TrainingError(f"{name} is {found} for each token, the model needs {expected}")
            record_TLK, known_T = values_at(batch[name], local_T), local_T >= 0
            if self.mode != "r2":
                known_T &= values_at(batch["rollout_routed_T"], local_T)
        replays = self.mode in ("r2", "r3")
        if replays:
            # Padding takes fixed experts, so that grouped products have the same shapes and rounding in both passes.
            record_TLK[local_T < 0] = torch.arange(self._shape.per_token, dtype=record_TLK.dtype)
            known_T |= local_T < 0
        routes = RowRoutes(local_T, record_TLK, known_T, replays, None if self._recording is None else {})
        row.packed.routes = routes
        if self._recording is not None:
            self._recording.append(routes)
        return row

    def on_device(self, row: RankRow) -> RankRow:
        """Return the row with its routes on this rank's device; they are freed with the returned row."""
        routes, device = row.packed.routes, self._mesh.world.device
        if routes is None or device.type == "cpu":
            return row
        moved = replace(routes, record_TLK=routes.record_TLK.to(device), known_T=routes.known_T.to(device))
        return replace(row, packed=replace(row.packed, routes=moved))

    def columns(self, recording: Sequence[RowRoutes], batch: Batch) -> Columns:
        """Return what a scoring pass found: ``routes_T`` under r2, else in how many layers the engine chose otherwise.

        ``routes_T``: uint8 or int16 [T, L, K]. ``routing_differs_T``: int32, layers of the whole model. Collective
        within the replica.

        Raises:
            TrainingError: a token was not routed exactly once in every layer.
        """
        if self._is_off:
            return {}
        if self.mode == "r2":
            routes_TLK = self._empty(int(batch.lengths_B.sum()))
            for place in range(len(self.layers)):
                routes_TLK[:, place] = self._gathered(recording, place, len(routes_TLK))
            return {"routes_T": routes_TLK}
        if self.mode == "none" or "rollout_routes_T" not in batch:
            return {}
        return {"routing_differs_T": self._differences(recording, int(batch.lengths_B.sum()))}

    def _empty(self, tokens: int) -> Tensor:
        return torch.zeros(tokens, len(self.layers), self._shape.per_token, dtype=getattr(torch, self._shape.dtype))

    @property
    def _reports(self) -> bool:
        """Whether this rank reports its tokens: without sequence parallelism, all tensor ranks have the same ones."""
        return self._shares_tokens or group_rank(self._mesh.tensor) == 0

    def _gathered(self, recording: Sequence[RowRoutes], place: int, total: int) -> Tensor:
        """Return [T, K], int32 on the CPU: one layer's choices, from all ranks of this stage."""
        local = torch.zeros(total, self._shape.per_token + 1, dtype=torch.int32, device=self._mesh.world.device)
        for routes in recording:
            if routes.chosen and place in routes.chosen and self._reports:
                real_T = (routes.token_ids_T >= 0).to(local.device)
                chosen_TK = routes.chosen[place][real_T].to(local.dtype)
                counted = torch.cat([chosen_TK, torch.ones_like(chosen_TK[:, :1])], dim=1)
                local.index_add_(0, routes.token_ids_T.to(local.device)[real_T], counted)
        summed = sum_over(self._mesh.stage, local).cpu()
        if bool((summed[:, -1] != 1).any()):
            wrong, layer = int((summed[:, -1] != 1).sum()), self._shape.layers[self.layers[place]]
            raise TrainingError(f"{wrong} of {total} tokens were not routed exactly once in layer {layer}")
        return summed[:, :-1]

    def _differences(self, recording: Sequence[RowRoutes], total: int) -> Tensor:
        differing_T = torch.zeros(total, dtype=torch.int32, device=self._mesh.world.device)
        for routes in recording if self._reports else ():
            known_T = (routes.known_T & (routes.token_ids_T >= 0)).to(differing_T.device)
            ids_T = routes.token_ids_T.to(differing_T.device)[known_T]
            for place, chosen_TK in (routes.chosen or {}).items():
                record_TK = routes.record_TLK[:, place].to(chosen_TK.device, chosen_TK.dtype)
                other_T = (record_TK.sort(1).values != chosen_TK.sort(1).values).any(1)
                differing_T.index_add_(0, ids_T, other_T[known_T].to(differing_T.dtype))
        return sum_over(self._mesh.replica, differing_T.cpu())


def _hand_over(replay: LayerReplay, _layer: nn.Module, _args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Pass the row's routes to a layer's router; a forward pre-hook, so that it also runs in recomputation."""
    packed = kwargs.get("packed_seq_params")
    replay.routes = packed.routes if isinstance(packed, PackedRow) else None
