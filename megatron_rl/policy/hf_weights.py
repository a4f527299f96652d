"""Loads Hugging Face checkpoints into this rank's shards and exports them, using the family's table of names."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_rl.config.schema import PUSH_BUFFERS
from megatron_rl.distributed.collectives import RankGroup, gather_over, group_rank, group_size
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping
from megatron_rl.models.hf_mapping.transformer_engine_names import to_local_name
from megatron_rl.policy.upstream import decoder_layers

Encode = Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]
"""Maps named tensors to those that are exported in their place."""


@dataclass(frozen=True)
class LocalParam:
    """One parameter or router bias of this rank: its table entry, its global indices and its tensor."""

    name: ParamMapping
    layer: int
    expert: int
    parameter: Tensor
    is_trained: bool = True
    stack: str = ""
    """Name of the stacked checkpoint tensor that contains this expert's; empty if the expert has its own tensor."""

    @property
    def full_name(self) -> str:
        """Megatron name with global indices, independent of the layout."""
        return self.name.megatron_name(self.layer, self.expert)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors that the parameter is made of."""
        return self.name.hf_names(self.layer, self.expert)

    def group(self, mesh: Mesh) -> RankGroup:
        """The ranks that shard this parameter."""
        return mesh.expert_tensor if self.name.is_expert else mesh.tensor

    def whole_group(self, mesh: Mesh) -> RankGroup:
        """The ranks that hold parts of the same checkpoint tensor."""
        return mesh.experts if self.stack else self.group(mesh)

    def is_first_copy(self, mesh: Mesh) -> bool:
        """True on the ranks of the first data-parallel replica of this parameter."""
        if self.name.is_expert:
            return group_rank(mesh.expert_data) == 0
        return group_rank(mesh.data) == 0 and group_rank(mesh.context) == 0

    def copies(self, mesh: Mesh) -> tuple[int, int]:
        """Return (index of this rank's replica of the shard, number of replicas)."""
        axes = [mesh.expert_data] if self.name.is_expert else [mesh.data, mesh.context]
        axes += [self.group(mesh)] if self.name.rule.dim is None else []
        copy, copies = 0, 1
        for axis in axes:
            copy, copies = copy * group_size(axis) + group_rank(axis), copies * group_size(axis)
        return copy, copies

    def owner_rank(self, mesh: Mesh) -> int:
        """The global rank that gathers this parameter's shards and exports the tensor."""
        group = self.whole_group(mesh)
        return mesh.world.rank if group is None else dist.get_global_rank(group, 0)


def shards_of(chunks: Sequence[DistributedDataParallel], family: Family, mesh: Mesh) -> list[LocalParam]:
    """Return every parameter and router bias of this rank with its table entry; a tied head is omitted.

    Raises:
        DataError: the table has no entry for a parameter.
    """
    entries = {name.megatron: name for name in family.mappings}
    first_expert = (
        group_rank(mesh.expert) * (family.num_experts // group_size(mesh.expert)) if family.num_experts else 0
    )
    shards = []
    for chunk, layers in decoder_layers(chunks):
        numbers = list(layers)
        trained = dict(chunk.named_parameters())
        biases = {name: bias for name, bias in chunk.named_buffers() if name.endswith(".expert_bias")}
        for param_name, parameter in (trained | biases).items():
            if family.tied and param_name == "output_layer.weight":
                continue
            canonical = to_local_name(param_name)
            layer = expert = 0
            if match := re.search(r"layers\.(\d+)\.", canonical):
                layer = numbers[int(match[1])]
                canonical = canonical.replace(match[0], "layers.{layer}.", 1)
            if match := re.search(r"local_experts\.(\d+)\.", canonical):
                expert = first_expert + int(match[1])
                canonical = canonical.replace(match[0], "local_experts.{expert}.", 1)
            if canonical not in entries:
                raise DataError(f"the model's parameter {param_name} has no entry in the table of names ({canonical})")
            name = entries[canonical]
            stack = family.stacked_names.get(name.hf[0], "").format(layer=layer)
            shards.append(LocalParam(name, layer, expert, parameter, param_name in trained, stack))
    return shards


def tied_copies(chunks: Sequence[DistributedDataParallel], family: Family) -> list[LocalParam]:
    """Return the tied output head on a last stage that does not hold the embedding, with the embedding's entry."""
    if not family.tied:
        return []
    embedding = next(name for name in family.mappings if name.megatron.startswith("embedding."))
    heads = [chunk for chunk in unwrap_model(list(chunks)) if chunk.post_process and not chunk.pre_process]
    return [LocalParam(embedding, 0, 0, chunk.output_layer.weight) for chunk in heads]


def mark_shards(shards: Sequence[LocalParam], mesh: Mesh) -> None:
    """Set megatron-core's attributes of tensor-parallel parameters.

    megatron-core's layers set them only when they initialize weights, which is skipped here. Without them, every rank
    but the first leaves its shards out of the gradient norm. Call this before the optimizer is built, because it copies
    them to its main parameters.

    A replicated parameter of an expert (a bias) counts in the gradient norm on expert-tensor rank 0 only, and its
    gradient is not summed over tensor-parallel ranks.
    """
    for shard in shards:
        dim = shard.name.rule.dim
        counts = dim is not None
        if shard.name.is_expert:
            counts = counts or group_rank(mesh.expert_tensor) == 0
            setattr(shard.parameter, "sequence_parallel", False)  # noqa: B010 (no attribute of Tensor)
        marks = {"tensor_model_parallel": counts, "partition_dim": -1 if dim is None else dim}
        for mark, value in {**marks, "partition_stride": 1}.items():
            setattr(shard.parameter, mark, value)


@torch.no_grad()
def load_weights(chunks: Sequence[DistributedDataParallel], family: Family, mesh: Mesh, folder: Path) -> None:
    """Load this rank's parameters from a checkpoint folder of any format.

    Raises:
        DataError: a tensor is missing, extra or of the wrong shape, or a file cannot be read.
    """
    source = open_checkpoint(folder, family)
    source.check(family)
    for shard in [*shards_of(chunks, family, mesh), *tied_copies(chunks, family)]:
        parts = [source.read(name) for name in shard.hf_names]
        group = shard.group(mesh)
        piece = shard.name.rule.shard(parts, group_rank(group), group_size(group))
        if not shard.is_trained:
            # megatron-core needs router biases in float32, but its bfloat16 wrapper has converted them
            shard.parameter.data = shard.parameter.data.to(torch.promote_types(piece.dtype, torch.float32))
        shard.parameter.copy_(piece)


@dataclass(frozen=True)
class WeightExport:
    """Exports the model tensor by tensor under Hugging Face names.

    Iteration, ``owned_tensors`` and ``stage_tensors`` are collective: every rank must exhaust the same one of them.

    Attributes:
        shards: this rank's parameters.
        mesh: this rank's process groups.
        bucket_bytes: memory limit per rank in addition to its shards, if the caller releases each tensor before the
            next. A single larger tensor exceeds it, and so does a stacked tensor of experts, in host memory.
        pick: maps a parameter to the exported tensor, such as its gradient.
        encode: maps merged tensors to the exported ones, such as quantized values and scales.
    """

    shards: Sequence[LocalParam]
    mesh: Mesh
    bucket_bytes: int
    pick: Callable[[Tensor], Tensor] = Tensor.detach
    encode: Encode = iter

    def encoded(self, encode: Encode) -> "WeightExport":
        """Return an export of the tensors that ``encode`` makes of the merged ones, on the rank that owns them."""
        return replace(self, encode=encode)

    def owned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, CPU tensor) of the tensors this rank owns; the union over ranks is the model."""
        for owner in range(self.mesh.world.size):
            for merged in self._merged(owner):
                yield from merged

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, CPU tensor) of every tensor on rank 0, to which owners send theirs; nothing on other ranks."""
        yield from self._collected(range(self.mesh.world.size))

    def stage_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, CPU tensor) of a pipeline stage's tensors on its first rank; nothing on its other ranks."""
        yield from self._collected(self.mesh.stage_ranks)

    def _collected(self, owners: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of these ranks on the first of them, to which the others send theirs."""
        mesh, part_bytes = self.mesh, self.bucket_bytes // PUSH_BUFFERS
        first = owners[0]
        for owner in owners:
            for merged in self._merged(owner):
                if owner == first:
                    yield from merged
                    continue
                for message in _messages(merged, part_bytes):
                    _send(message, mesh, part_bytes, first)
                    message.clear()
            if mesh.world.rank == owner != first:
                _send({}, mesh, 0, first)
            elif mesh.world.rank == first != owner:
                yield from _receive(owner, mesh, part_bytes)

    @torch.no_grad()
    def _merged(self, owner: int) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yield the owner's tensors per bucket, on the owner; the ranks that shard them take part in the gathering."""
        mine = [
            shard for shard in self.shards if shard.is_first_copy(self.mesh) and shard.owner_rank(self.mesh) == owner
        ]
        # Separate buckets for dense tensors and experts: each is gathered over its group, with equal buckets on all
        # ranks.
        stacked = sorted((s for s in mine if s.stack), key=attrgetter("stack"))  # one after the other
        dense, experts = ([s for s in mine if not s.stack and s.name.is_expert == expert] for expert in (False, True))
        for part in (dense, experts, stacked):
            group = part[0].whole_group(self.mesh) if part else None
            share, stacks = self.bucket_bytes // PUSH_BUFFERS // group_size(group), ExpertStacker(self.mesh)
            for bucket in _buckets(part, share):
                gathered = _gather(bucket, group, self.pick)
                if self.mesh.world.rank == owner:
                    yield (
                        self.encode(stacks.merge(bucket, gathered))
                        if part is stacked
                        else _merge(bucket, gathered, self.encode)
                    )
                del gathered  # before the next one comes


def _buckets(shards: Sequence[LocalParam], bucket_bytes: int) -> Iterator[list[LocalParam]]:
    """Yield consecutive shards of one dtype that fit into a bucket."""
    bucket: list[LocalParam] = []
    used = 0
    for shard in shards:
        size = shard.parameter.numel() * shard.parameter.element_size()
        if bucket and (used + size > bucket_bytes or shard.parameter.dtype != bucket[0].parameter.dtype):
            yield bucket
            bucket, used = list[LocalParam](), 0
        bucket.append(shard)
        used += size
    if bucket:
        yield bucket


def _gather(bucket: Sequence[LocalParam], group: RankGroup, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the bucket's shards of all ranks of the group, [ranks, elements], with one collective."""
    if group_size(group) > 1:
        return gather_over(group, torch.cat([pick(shard.parameter).flatten() for shard in bucket]))
    return torch.cat([pick(shard.parameter).flatten() for shard in bucket])[None]


def _pieces(bucket: Sequence[LocalParam], gathered: Tensor) -> Iterator[tuple[LocalParam, list[Tensor]]]:
    """Yield each shard of a bucket with the corresponding shards of all ranks, in rank order."""
    offset = 0
    for shard in bucket:
        count = shard.parameter.numel()
        yield shard, [rank_flat[offset : offset + count].view(shard.parameter.shape) for rank_flat in gathered]
        offset += count


def _merge(bucket: Sequence[LocalParam], gathered: Tensor, encode: Encode) -> Iterator[tuple[str, Tensor]]:
    """Yield the merged and encoded tensors of a bucket, copied so that the bucket can be freed."""
    for shard, pieces in _pieces(bucket, gathered):
        for name, part in encode(zip(shard.hf_names, shard.name.rule.merge(pieces), strict=True)):
            whole = part.contiguous().cpu()
            shares = whole.untyped_storage().data_ptr() == gathered.untyped_storage().data_ptr()
            yield name, whole.clone() if shares else whole


@dataclass
class ExpertStacker:
    """Assembles stacked expert tensors in host memory, each from its first to its last bucket."""

    mesh: Mesh
    _open: dict[str, Tensor] = field(default_factory=dict)
    _missing: dict[str, int] = field(default_factory=dict)

    def merge(self, bucket: Sequence[LocalParam], gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the stacked tensors that a bucket completes; ``gathered`` is in the rank order of ``Mesh.experts``."""
        sharing, ranks = group_size(self.mesh.expert_tensor), group_size(self.mesh.expert)
        for shard, pieces in _pieces(bucket, gathered):
            name, experts = shard.stack, shard.name.experts
            for rank in range(ranks):
                (one,) = shard.name.rule.merge(pieces[rank * sharing : (rank + 1) * sharing])
                if name not in self._open:
                    self._open[name] = torch.empty(experts, *one.shape, dtype=one.dtype)
                    self._missing[name] = experts
                self._open[name][rank * (experts // ranks) + shard.expert] = one
            self._missing[name] -= ranks
            if not self._missing[name]:
                yield name, self._open.pop(name)


def _messages(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield tensors in groups of at most this many bytes; a larger tensor is a group of its own."""
    message: dict[str, Tensor] = {}
    used = 0
    for name, tensor in tensors:
        if message and used + tensor.nbytes > most_bytes:
            yield message
            message = {}
            used = 0
        message[name] = tensor
        used += tensor.nbytes
        del tensor
    if message:
        yield message


def _send(tensors: Mapping[str, Tensor], mesh: Mesh, part_bytes: int, receiver: int) -> None:
    """Send tensors to a rank in parts of at most ``part_bytes`` bytes."""
    device = mesh.world.device
    header = json.dumps([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()])
    text = torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8).to(device)
    dist.send(torch.tensor([len(text)], device=device), dst=receiver)
    dist.send(text, dst=receiver)
    flats = [t.flatten().view(torch.uint8) for t in tensors.values()]
    flat = flats[0] if len(flats) == 1 else torch.cat(flats) if flats else text[:0]
    for part in flat.split(part_bytes) if flats else ():
        dist.send(part.to(device), dst=receiver)


def _receive(owner: int, mesh: Mesh, part_bytes: int) -> Iterator[tuple[str, Tensor]]:
    device = mesh.world.device
    while True:
        size = torch.zeros(1, dtype=torch.int64, device=device)
        dist.recv(size, src=owner)
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.recv(text, src=owner)
        entries = json.loads(text.cpu().numpy().tobytes())
        if not entries:
            return
        sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for _, shape, dtype in entries]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        for part in flat.split(part_bytes):
            buffer = torch.empty_like(part, device=device)
            dist.recv(buffer, src=owner)
            part.copy_(buffer)
        del buffer, part
        for (name, shape, dtype), part in zip(entries, flat.split(sizes), strict=True):
            tensor = part if len(entries) == 1 else part.clone()
            yield name, tensor.view(getattr(torch, dtype)).view(shape)
        del flat, part, tensor  # before the next one comes
