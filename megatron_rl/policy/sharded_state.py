"""Saves this rank's part of model and optimizer as slices, and loads slices written under any layout."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.distributed.collectives import group_rank, group_size
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.models.hf_mapping.rules import Shard
from megatron_rl.models.sharded_files import ShardedStateReader, StateSlice
from megatron_rl.policy.hf_weights import LocalParam
from megatron_rl.policy.optimizer import OptimizerPart


def state_slices(
    shards: Sequence[LocalParam], parts: Mapping[Tensor, OptimizerPart], mesh: Mesh
) -> Iterator[tuple[StateSlice, Tensor]]:
    """Yield the slices that this rank saves, one-dimensional, sharing memory with the policy.

    The union over all ranks contains every element once. Replicated shards are divided among the ranks that hold them.
    """
    for number, shard in enumerate(shards):
        copy, copies = shard.copies(mesh)
        mine = number % copies == copy
        if mine:
            yield _place("model", shard, mesh), shard.parameter.detach().flatten()
        part = parts.get(shard.parameter)
        # The distributed optimizer shards over data-parallel ranks; tensor ranks hold equal copies of replicated ones.
        repeated = shard.name.rule.dim is None and group_rank(shard.group(mesh)) > 0
        if part is not None and (not repeated if part.is_shared_out else mine):
            for kind, values in part.tensors().items():
                yield _place(kind, shard, mesh, part.start), values.detach().flatten()


@torch.no_grad()
def load_sharded_state(
    reader: ShardedStateReader,
    shards: Sequence[LocalParam],
    parts: Mapping[Tensor, OptimizerPart],
    mesh: Mesh,
    updates: int,
) -> None:
    """Fill this rank's parameters, main parameters and moments after ``updates`` optimizer steps.

    Raises:
        DataError: a tensor is missing, damaged or of the wrong shape.
    """
    for shard in shards:
        layout = shard.name.rule
        weights = reader.read(_place("model", shard, mesh), layout)
        main = _place("main", shard, mesh)
        if weights.dtype is not shard.parameter.dtype and main.tensor in reader:
            weights = reader.read(main, layout)  # model.dtype has changed: do not round twice
        shard.parameter.copy_(weights.view(shard.parameter.shape))
        part = parts.get(shard.parameter)
        if part is None:
            continue
        count = part.main.numel()
        kinds = [*(["main"] if part.has_main_copy else []), *(part.moments if updates else [])]
        values = {}
        for kind in kinds:
            place = _place(kind, shard, mesh, part.start)
            if kind == "main" and place.tensor not in reader:  # there was no separate float32 copy
                place = _place("model", shard, mesh, part.start)
            values[kind] = reader.read(place, layout, count).view(part.main.shape)
        part.fill(values, updates)


def reference_slices(
    shards: Sequence[LocalParam], reference: Mapping[Tensor, Tensor], mesh: Mesh
) -> Iterator[tuple[StateSlice, Tensor]]:
    """Yield the slices of the reference policy that this rank saves, divided like those of the model.

    Args:
        shards: parameters of this rank.
        reference: the reference's tensor of each parameter.
        mesh: this rank's groups.
    """
    for number, shard in enumerate(shards):
        copy, copies = shard.copies(mesh)
        if shard.parameter in reference and number % copies == copy:
            yield _place("reference", shard, mesh), reference[shard.parameter].flatten()


def load_reference(
    reader: ShardedStateReader, shards: Sequence[LocalParam], reference: Mapping[Tensor, Tensor], mesh: Mesh
) -> None:
    """Fill the reference policy from a checkpoint; one without a reference leaves it as it is.

    Raises:
        DataError: a tensor is damaged or of the wrong shape.
    """
    for shard in shards:
        place = _place("reference", shard, mesh)
        if shard.parameter in reference and place.tensor in reader:
            values = reader.read(place, shard.name.rule)
            reference[shard.parameter].copy_(values.view(shard.parameter.shape))


def rng_slices(states: Mapping[str, Tensor], mesh: Mesh) -> dict[str, tuple[StateSlice, Tensor]]:
    """Return the states of this rank's random generators with their slices, by name."""
    rank, size = mesh.world.rank, mesh.world.size
    return {
        name: (StateSlice(tensor=f"rng/{name}", shard=rank, shards=size, shape=tuple(state.shape)), state)
        for name, state in states.items()
    }


PER_RANK = Shard(0)
"""Rule of generator states: one shard per rank."""


def _place(kind: str, shard: LocalParam, mesh: Mesh, start: int = 0) -> StateSlice:
    whole, group = shard.name.rule.dim is None, shard.group(mesh)
    return StateSlice(
        tensor=f"{kind}/{shard.full_name}",
        shard=0 if whole else group_rank(group),
        shards=1 if whole else group_size(group),
        shape=tuple(shard.parameter.shape),
        start=start,
    )
