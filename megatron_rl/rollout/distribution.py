"""Brings the token columns of a step to the data-parallel replicas that own them.

    controller -> main rank            ->  the first rank of each replica: the columns of its own responses
    first rank of a replica            ->  the other ranks of the replica
    its routes                         ->  the ranks of each pipeline stage: only the layers of the stage

Columns stay in host memory on the way, so no device holds a column that its layers do not read, and a rank holds the
tokens of its own replica only. Legend: T tokens, L layers with experts, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.data.columns import ROUTE_COLUMNS
from megatron_rl.data.minibatch import Minibatch, MinibatchPlan
from megatron_rl.data.types import Batch, Columns
from megatron_rl.distributed.collectives import as_bytes, broadcast_json, gather_json, group_rank, group_size
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.distributed.replicas import CPU

ReadColumns = Callable[[Tensor], Columns]
"""Returns all token columns of the responses with these ``sample_index_B``, concatenated in this order."""

Schema = Mapping[str, tuple[str, Sequence[int]]]
"""Name of a token column -> dtype and dimensions after the first."""


def columns_of(batch: Batch) -> ReadColumns:
    """Return a function that reads token columns from a batch of the whole step."""

    def read(samples: Tensor) -> Columns:
        # Samples that were dropped from the batch leave gaps, but the order remains.
        selected = batch.select(torch.searchsorted(batch["sample_index_B"], samples))
        return {name: column for name, column in selected.columns.items() if name.endswith("_T")}

    return read


def schema_of(columns: Columns) -> Schema:
    """Return the schema of token columns, as JSON."""
    return {
        name: (str(column.dtype).removeprefix("torch."), list(column.shape[1:]))
        for name, column in columns.items()
        if name.endswith("_T")
    }


class TokenDistribution:
    """Distributes token columns; every rank has one, and calls ``fetch`` at the same time.

    Args:
        mesh: this rank's groups.
        route_layers: which of the layers with experts this rank has, ascending; their routes are all it receives.
    """

    def __init__(self, mesh: Mesh, route_layers: Sequence[int]) -> None:
        self._mesh = mesh
        place = {"layers": list(route_layers), "leads": group_rank(mesh.replica_stage) == 0}
        places = cast(list[dict[str, object]], gather_json(place, CPU, mesh.replica))
        self._stage_firsts = {rank: cast(list[int], at["layers"]) for rank, at in enumerate(places) if at["leads"]}
        self._layers = list(route_layers)

    def fetch(self, plans: Sequence[MinibatchPlan], read: ReadColumns | None, schema: Schema | None) -> list[Minibatch]:
        """Return this replica's part of each mini-batch, with all columns.

        Args:
            plans: the mini-batches of a step; their outlines have ``sample_index_B``.
            read: reads token columns on the main rank; None on the others.
            schema: the columns that ``read`` returns; None on the other ranks.
        """
        known = cast(Schema, broadcast_json(schema, 0, self._mesh.world.device))
        return [self._fetch(plan, read, known) for plan in plans]

    def _fetch(self, plan: MinibatchPlan, read: ReadColumns | None, schema: Schema) -> Minibatch:
        part = plan.outline.select(plan.owned())
        tokens = int(part.lengths_B.sum())
        columns = self._to_replica(plan, read, schema, tokens) if self._mesh.leads_replica else None
        return plan.minibatch(part.add(self._within_replica(columns, schema, tokens)))

    def _to_replica(self, plan: MinibatchPlan, read: ReadColumns | None, schema: Schema, tokens: int) -> Columns:
        """Return the replica's own columns on its first rank: sent by the main rank, or read there."""
        peers = self._mesh.peers
        if read is None:
            columns = {name: _empty(tokens, schema[name]) for name in schema}
            for column in columns.values():
                _receive(column, 0, peers)
            return columns
        sample_index_B = plan.outline["sample_index_B"]
        for replica in range(1, plan.replicas):
            columns = read(sample_index_B[plan.owned(replica)])
            for name in schema:
                _send(columns[name], replica, peers)
        return read(sample_index_B[plan.owned(0)])

    def _within_replica(self, columns: Columns | None, schema: Schema, tokens: int) -> Columns:
        """Return the columns on every rank of the replica, routes without the layers of other stages."""
        found: dict[str, Tensor] = {}
        for name, (dtype, trailing) in schema.items():
            whole = None if columns is None else columns[name]
            if name in ROUTE_COLUMNS:
                found[name] = self._routes(whole, tokens, dtype, trailing[1])
                continue
            column = _empty(tokens, (dtype, trailing)) if whole is None else whole.contiguous()
            _broadcast(column, self._mesh.replica)
            found[name] = column
        return found

    def _routes(self, whole_TLK: Tensor | None, tokens: int, dtype: str, experts_per_token: int) -> Tensor:
        """Return the routes of this stage's layers: from the first rank of the replica to that of the stage, and on."""
        routes_TLK = _empty(tokens, (dtype, [len(self._layers), experts_per_token]))
        for rank, layers in self._stage_firsts.items():
            if whole_TLK is not None and rank == 0:
                routes_TLK = whole_TLK[:, layers].contiguous()
            elif whole_TLK is not None:
                _send(whole_TLK[:, layers], rank, self._mesh.replica)
            elif rank == group_rank(self._mesh.replica):
                _receive(routes_TLK, 0, self._mesh.replica)
        _broadcast(routes_TLK, self._mesh.replica_stage)
        return routes_TLK


def _empty(tokens: int, schema: tuple[str, Sequence[int]]) -> Tensor:
    dtype, trailing = schema
    return torch.empty(tokens, *trailing, dtype=getattr(torch, dtype))


def _send(column: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    if column.numel():
        dist.send(as_bytes(column.contiguous()), group=group, group_dst=rank)


def _receive(column: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
    if column.numel():
        dist.recv(as_bytes(column), group=group, group_src=rank)


def _broadcast(column: Tensor, group: dist.ProcessGroup | None) -> None:
    if column.numel() and group_size(group) > 1:
        dist.broadcast(as_bytes(column), group=group, group_src=0)
