"""How Hugging Face tensors become one rank's Megatron tensor, and back: the only code that knows sharding layouts.

A family is a table of ``ParamMapping`` entries; loading, pushing and converting all follow from it. ``shard`` and
``merge`` are exact inverses: they only cut, reorder and pad, so values keep every bit.
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
"""A parsed config.json: its values are whatever the JSON holds."""


class ShardRule(Protocol):
    """A rule between the Hugging Face tensors of one entry and the shards of one Megatron tensor."""

    @property
    def dim(self) -> int | None:
        """The dimension that is cut over tensor-parallel ranks; None for a tensor that every rank holds whole."""
        ...

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the shard of tensor-parallel rank ``rank`` of ``size``."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors from all shards in rank order."""
        ...


@dataclass(frozen=True)
class Replicate:
    """The same on every rank."""

    dim: int | None = None

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the tensor itself."""
        return parts[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the first rank's copy."""
        return (shards[0],)


@dataclass(frozen=True)
class Shard:
    """Cut in equal pieces along one dimension (of the Megatron tensor, where the other one is transposed)."""

    dim: int
    transposed: bool = False

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return piece ``rank``."""
        whole = parts[0].T.contiguous() if self.transposed else parts[0]
        return whole.chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Join the pieces."""
        whole = torch.cat(list(shards), self.dim)
        return (whole.T if self.transposed else whole,)


@dataclass(frozen=True)
class ShardVocabulary:
    """Rows of the vocabulary, padded with zeros so that every rank holds equally many."""

    rows: int
    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's rows of the padded matrix."""
        per_rank = -(-self.rows // size)
        rows = parts[0][rank * per_rank : (rank + 1) * per_rank]
        return torch.cat([rows, rows.new_zeros(per_rank - len(rows), *rows.shape[1:])])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Join the rows and drop the padding."""
        return (torch.cat(list(shards))[: self.rows],)


@dataclass(frozen=True)
class FuseQKV:
    """Query, key and value rows interleaved by query group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    heads: int
    groups: int
    head_dim: int
    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the groups of this rank."""
        query, key, value = (part.unflatten(0, (self.groups, -1)).chunk(size)[rank] for part in parts)
        return torch.cat([query, key, value], dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take the groups apart again."""
        grouped = torch.cat(list(shards)).unflatten(0, (self.groups, -1))
        sizes = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))


@dataclass(frozen=True)
class FuseGateUp:
    """Gate rows above up rows within each shard."""

    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's gate rows, then its up rows."""
        return torch.cat([part.chunk(size)[rank] for part in parts])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the whole gate and the whole up matrix."""
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


@dataclass(frozen=True)
class FuseInterleavedGateUp:
    """Gate and up in one Hugging Face tensor, in turn along its last dimension: [inputs, gate 0, up 0, gate 1, ...].

    The Megatron tensor has gate rows above up rows within each shard. A bias has that one dimension only.
    """

    dim: int = 0

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return this rank's gate rows, then its up rows."""
        rows = parts[0].movedim(-1, 0)
        return torch.cat([rows[half::2].chunk(size)[rank] for half in range(2)])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the whole tensor."""
        halves = [shard.chunk(2) for shard in shards]
        rows = shards[0].new_empty(sum(len(shard) for shard in shards), *shards[0].shape[1:])
        for half in range(2):
            rows[half::2] = torch.cat([pair[half] for pair in halves])
        return (rows.movedim(0, -1),)


@dataclass(frozen=True)
class ParamMapping:
    """One entry: a Megatron name, the Hugging Face names that make it, their shapes, and the rule between them.

    ``{layer}`` and ``{expert}`` stand for global indices. Megatron names are those of the local layer spec, not of
    transformer-engine's.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: ShardRule
    shapes: tuple[Shape, ...]
    layers: tuple[int, ...] = (0,)
    """The layers that have it; meaningless where no ``{layer}`` is in the names."""
    experts: int = 0
    """How many copies a layer has, one an expert; 0 for a tensor that no expert owns."""

    @property
    def is_expert(self) -> bool:
        """True where each expert has a tensor of its own."""
        return self.experts > 0

    @cached_property
    def full_shape(self) -> Shape:
        """Shape of the Megatron tensor if one rank holds all of it."""
        parts = [torch.empty(shape, device="meta") for shape in self.shapes]
        return tuple(self.rule.shard(parts, 0, 1).shape)

    def megatron_name(self, layer: int, expert: int) -> str:
        """Return the Megatron name for these indices."""
        return self.megatron.format(layer=layer, expert=expert)

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Return the Hugging Face names for these indices."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)

    def instances(self) -> Iterator[tuple[int, int]]:
        """Yield the (layer, expert) of every copy."""
        return ((layer, expert) for layer in self.layers for expert in range(self.experts or 1))


@dataclass(frozen=True)
class FusedParam:
    """Another form that a checkpoint may have: one tensor whose rows are those of ``parts``, one below the other.

    Where the parts belong to experts, the tensor has one more dimension in front, over the experts.
    """

    hf: str
    parts: tuple[str, ...]
    required: bool = False
    """There is no other form: what goes out has it too. Its parts are then those of one entry of the table."""

    @property
    def is_stacked(self) -> bool:
        """True where it holds all experts of a layer."""
        return "{expert}" in self.parts[0]


@dataclass(frozen=True)
class Family:
    """A model as megatron-core must build it, and its table of names.

    Attributes:
        fields: arguments of TransformerConfig.
        mappings: the table.
        vocab_size: true vocabulary, before padding.
        max_position_embeddings: longest sequence.
        rotary_base: base of the rotary embedding.
        rotary_percent: share of a head's dimensions that rotate.
        rotary_factor: by which Llama 3 stretches long wavelengths; None: not at all.
        tied: the output head is the embedding.
        dense_layers: layers without experts.
        fused: other forms of some tensors.
        passthrough: patterns of tensors that a checkpoint may have besides: they go along, training does not see them.
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
        """Number of experts of a mixture layer; 0 for a dense model."""
        return int(str(self.fields.get("num_moe_experts") or 0))

    @property
    def has_latent_attention(self) -> bool:
        """True for multi-head latent attention, which megatron-core builds from other modules."""
        return bool(self.fields.get("multi_latent_attention"))

    @property
    def attention_window(self) -> int:
        """Tokens that one sees in a layer with a window, itself included; 0 where no layer has one."""
        size = self.fields.get("window_size")
        return size[0] + 1 if isinstance(size, tuple) else 0

    @property
    def num_windowed_layers(self) -> int:
        """How many layers have a window."""
        layers = self.fields.get("window_attn_skip_freq")
        return sum(layers) if isinstance(layers, list) else 0

    @property
    def route_shape(self) -> RouteShape:
        """What a record of its tokens' experts looks like."""
        layers = tuple(n for n in range(self.num_layers) if n not in self.dense_layers) if self.num_experts else ()
        per_token = int(str(self.fields.get("moe_router_topk") or 0))
        return RouteShape(layers, self.num_layers, self.num_experts, per_token)

    @cached_property
    def stacked_names(self) -> Mapping[str, str]:
        """Parts of a layer's experts that only come stacked -> the tensor that they make; names with placeholders."""
        return {fused.parts[0]: fused.hf for fused in self.fused if fused.required}

    def fused_parts(self, *, required: bool = False) -> dict[str, tuple[str, ...]]:
        """Return the parts of each joined tensor, in the order of its bytes; ``only``: where there is no other form."""
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
        """Yield every parameter of the model: its table entry, layer and expert (0 where the entry has none)."""
        for name in self.mappings:
            for layer, expert in name.instances():
                yield name, layer, expert

    def hf_shapes(self) -> dict[str, Shape]:
        """Return the name and shape of every tensor that a checkpoint of this model must hold."""
        shapes: dict[str, Shape] = {}
        for name, layer, expert in self.parameters():
            shapes.update(zip(name.hf_names(layer, expert), name.shapes, strict=True))
        return shapes

    def is_passthrough(self, hf_name: str) -> bool:
        """Return whether this tensor, which the table does not have, may be there all the same."""
        tied_head = self.tied and hf_name == "lm_head.weight"
        return tied_head or any(re.fullmatch(pattern, hf_name) for pattern in self.passthrough)
