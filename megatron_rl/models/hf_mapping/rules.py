"""Maps Hugging Face tensors to the shard of one Megatron rank and back. No other module knows how tensors are sharded.

A model family is a table of ``ParamMapping`` entries. Loading, exporting, pushing and converting weights all use this
table. ``shard`` and ``merge`` are exact inverses: they slice, reorder and pad, and change no bit of a value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.data.routes import RouteShape

Shape = tuple[int, ...]
HFConfig = Mapping[str, Any]
"""A parsed config.json."""


class ShardRule(Protocol):
    """Converts the Hugging Face tensors of one ``ParamMapping`` to shards of the Megatron tensor and back."""

    @property
    def dim(self) -> int | None:
        """The dimension sharded over tensor-parallel ranks; None if every rank holds the full tensor."""
        ...

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the shard of tensor-parallel rank ``rank`` of ``size`` ranks."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors, given the shards of all ranks in rank order."""
        ...


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the full tensor."""

    dim: int | None = None

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the tensor itself."""
        return parts[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the first rank's copy."""
        return (shards[0],)


@dataclass(frozen=True)
class Shard:
    """Equal chunks along one dimension.

    Attributes:
        dim: dimension of the Megatron tensor.
        transposed: the Hugging Face tensor is the transpose of the Megatron tensor.
    """

    dim: int
    transposed: bool = False

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return chunk ``rank``."""
        full = parts[0].T.contiguous() if self.transposed else parts[0]
        return full.chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Concatenate the chunks."""
        full = torch.cat(list(shards), self.dim)
        return (full.T if self.transposed else full,)


@dataclass(frozen=True)
class ShardVocabulary:
    """Vocabulary rows, padded with zeros so that all ranks hold the same number of rows.

    Attributes:
        rows: number of rows without padding.
    """

    rows: int
    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's rows of the padded matrix."""
        per_rank = -(-self.rows // size)
        rows = parts[0][rank * per_rank : (rank + 1) * per_rank]
        return torch.cat([rows, rows.new_zeros(per_rank - len(rows), *rows.shape[1:])])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Concatenate the rows and drop the padding."""
        return (torch.cat(list(shards))[: self.rows],)


@dataclass(frozen=True)
class FuseQKV:
    """Query, key and value rows interleaved by query group: [q of group 0, k 0, v 0, q of group 1, ...].

    Attributes:
        heads: query heads.
        groups: query groups, which equal key-value heads.
        head_dim: rows per head.
    """

    heads: int
    groups: int
    head_dim: int
    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's groups, fused."""
        query, key, value = (part.unflatten(0, (self.groups, -1)).chunk(size)[rank] for part in parts)
        return torch.cat([query, key, value], dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the full query, key and value matrices."""
        grouped = torch.cat(list(shards)).unflatten(0, (self.groups, -1))
        sizes = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))


@dataclass(frozen=True)
class FuseGateUp:
    """Each shard is its rows of the gate matrix followed by its rows of the up matrix."""

    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's gate rows followed by its up rows."""
        return torch.cat([part.chunk(size)[rank] for part in parts])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the full gate matrix and the full up matrix."""
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


@dataclass(frozen=True)
class FuseInterleavedGateUp:
    """As ``FuseGateUp``, from one Hugging Face tensor with gate and up interleaved: [..., (gate 0, up 0, gate 1, ...)].

    The last dimension of the Hugging Face tensor is the first of the Megatron tensor. A bias has only this dimension.
    """

    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's gate rows followed by its up rows."""
        rows = parts[0].movedim(-1, 0)
        return torch.cat([rows[half::2].chunk(size)[rank] for half in range(2)])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the full interleaved tensor."""
        halves = [shard.chunk(2) for shard in shards]
        rows = shards[0].new_empty(sum(len(shard) for shard in shards), *shards[0].shape[1:])
        for half in range(2):
            rows[half::2] = torch.cat([pair[half] for pair in halves])
        return (rows.movedim(0, -1),)


@dataclass(frozen=True)
class ParamMapping:
    """One entry of a family's table: a Megatron parameter, the Hugging Face tensors it is made of, and the rule.

    Names may contain ``{layer}`` and ``{expert}``, which stand for global indices. Megatron names are those of the
    local layer spec, not of transformer-engine's.

    Attributes:
        megatron: name of the Megatron parameter.
        hf: names of the Hugging Face tensors.
        rule: conversion between the two.
        shapes: shapes of the Hugging Face tensors.
        layers: layers that have the parameter. Ignored if the names have no ``{layer}``.
        experts: experts per layer, each with its own tensor; 0 if the parameter does not belong to an expert.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: ShardRule
    shapes: tuple[Shape, ...]
    layers: tuple[int, ...] = (0,)
    experts: int = 0

    @property
    def is_expert(self) -> bool:
        """True if each expert has its own tensor."""
        return self.experts > 0

    @cached_property
    def full_shape(self) -> Shape:
        """Shape of the Megatron tensor at tensor-parallel size 1."""
        parts = [torch.empty(shape, device="meta") for shape in self.shapes]
        return tuple(self.rule.shard(parts, 0, 1).shape)

    def megatron_name(self, layer: int, expert: int) -> str:
        """Return the Megatron name at these indices."""
        return self.megatron.format(layer=layer, expert=expert)

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Return the Hugging Face names at these indices."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)

    def instances(self) -> Iterator[tuple[int, int]]:
        """Yield (layer, expert) of every parameter that this entry describes."""
        return ((layer, expert) for layer in self.layers for expert in range(self.experts or 1))


@dataclass(frozen=True)
class FusedParam:
    """An alternative form in a checkpoint: one tensor that concatenates the rows of several.

    If the parts belong to experts, the tensor has an additional first dimension over the experts.

    Attributes:
        hf: name of the fused tensor.
        parts: names of the tensors that it replaces.
        required: the fused form is the only one, so exports use it too. Its parts then belong to one ``ParamMapping``.
    """

    hf: str
    parts: tuple[str, ...]
    required: bool = False

    @property
    def is_stacked(self) -> bool:
        """True if the tensor holds all experts of a layer."""
        return "{expert}" in self.parts[0]


@dataclass(frozen=True)
class Family:
    """The architecture of a model: megatron-core's settings and the table of parameter names.

    Attributes:
        fields: arguments of megatron-core's TransformerConfig.
        mappings: the table of parameter names.
        vocab_size: vocabulary size without padding.
        max_position_embeddings: maximum sequence length, tokens.
        rotary_base: base of the rotary embedding.
        rotary_percent: fraction of the dimensions of a head that is rotated.
        rotary_factor: scaling factor of Llama 3's rotary embedding; None: unscaled.
        tied: the output head shares the embedding's weight.
        dense_layers: layers without experts.
        fused: alternative forms of some tensors.
        passthrough: patterns of additional tensors that a checkpoint may have. They are copied when a checkpoint is
            converted and are not trained.
    """

    fields: Mapping[str, object]
    mappings: tuple[ParamMapping, ...]
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    tied: bool
    rotary_percent: float = 1.0
    rotary_factor: float | None = None
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    fused: tuple[FusedParam, ...] = ()
    passthrough: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(str(self.fields["num_layers"]))

    @property
    def num_experts(self) -> int:
        """Experts per mixture-of-experts layer; 0 for a dense model."""
        return int(str(self.fields.get("num_moe_experts") or 0))

    @property
    def has_latent_attention(self) -> bool:
        """True for multi-head latent attention, which megatron-core builds from other modules."""
        return bool(self.fields.get("multi_latent_attention"))

    @property
    def attention_window(self) -> int:
        """Tokens that a query attends to in a sliding-window layer, itself included; 0 if no layer has a window."""
        size = self.fields.get("window_size")
        return size[0] + 1 if isinstance(size, tuple) else 0

    @property
    def num_windowed_layers(self) -> int:
        """Number of layers with sliding-window attention."""
        layers = self.fields.get("window_attn_skip_freq")
        return sum(layers) if isinstance(layers, list) else 0

    @property
    def route_shape(self) -> RouteShape:
        """Shape of the record of the experts that each token was routed to."""
        layers = tuple(n for n in range(self.num_layers) if n not in self.dense_layers) if self.num_experts else ()
        per_token = int(str(self.fields.get("moe_router_topk") or 0))
        return RouteShape(layers, self.num_layers, self.num_experts, per_token)

    @cached_property
    def stacked_names(self) -> Mapping[str, str]:
        """Name of an expert tensor -> name of the stacked tensor, for tensors that only exist in stacked form."""
        return {fused.parts[0]: fused.hf for fused in self.fused if fused.required}

    def fused_parts(self, *, required: bool = False) -> dict[str, tuple[str, ...]]:
        """Return the parts of each fused tensor, in memory order; ``required`` selects those with no other form."""
        return {
            fused.hf.format(layer=layer): tuple(
                part.format(layer=layer, expert=expert)
                for expert in range(self.num_experts if fused.is_stacked else 1)
                for part in fused.parts
            )
            for fused in self.fused
            if fused.required or not required
            for layer in range(self.num_layers)
        }

    def parameters(self) -> Iterator[tuple[ParamMapping, int, int]]:
        """Yield (table entry, layer, expert) of every parameter; the indices are 0 where they do not apply."""
        for mapping in self.mappings:
            for layer, expert in mapping.instances():
                yield mapping, layer, expert

    def hf_shapes(self) -> dict[str, Shape]:
        """Return the shape of every tensor that a checkpoint of this model must contain, by name."""
        shapes: dict[str, Shape] = {}
        for mapping, layer, expert in self.parameters():
            shapes.update(zip(mapping.hf_names(layer, expert), mapping.shapes, strict=True))
        return shapes

    def is_passthrough(self, hf_name: str) -> bool:
        """Return whether a checkpoint may contain this tensor although the table does not list it."""
        tied_head = self.tied and hf_name == "lm_head.weight"
        return tied_head or any(re.fullmatch(pattern, hf_name) for pattern in self.passthrough)
