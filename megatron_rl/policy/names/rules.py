"""How Hugging Face tensors become one rank's Megatron tensor, and back: the only code that knows sharding layouts.

A family is a table of ``Name`` entries; loading, pushing and converting all follow from it. ``shard`` and ``merge`` are
exact inverses: they only cut, reorder and pad, so values keep every bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

HFConfig = Mapping[str, Any]
"""A parsed config.json: its values are whatever the JSON holds."""


class Layout(Protocol):
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
class Whole:
    """The same on every rank."""

    dim: int | None = None

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the tensor itself."""
        return parts[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the first rank's copy."""
        return (shards[0],)


@dataclass(frozen=True)
class Split:
    """Cut in equal pieces along one dimension."""

    dim: int

    def shard(self, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return piece ``rank``."""
        return parts[0].chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Join the pieces."""
        return (torch.cat(list(shards), self.dim),)


@dataclass(frozen=True)
class VocabularyRows:
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
class QKV:
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
class GateUp:
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
class Name:
    """One entry: a Megatron name, the Hugging Face names that make it, and the layout between them.

    ``{layer}`` and ``{expert}`` stand for global indices. Megatron names are those of the local layer spec, not of
    transformer-engine's.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout

    @property
    def is_expert(self) -> bool:
        """True where each expert has a tensor of its own."""
        return "{expert}" in self.megatron

    def full(self, layer: int, expert: int) -> str:
        """Return the Megatron name for these indices."""
        return self.megatron.format(layer=layer, expert=expert)

    def hf_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Return the Hugging Face names for these indices."""
        return tuple(name.format(layer=layer, expert=expert) for name in self.hf)


@dataclass(frozen=True)
class Family:
    """A model as megatron-core must build it, and its table of names.

    Attributes:
        fields: arguments of TransformerConfig.
        names: the table.
        hf_shapes: expected shape of each Hugging Face tensor, by name pattern.
        vocab_size: true vocabulary, before padding.
        max_position_embeddings: longest sequence.
        rotary_base: base of the rotary embedding.
        tied: the output head is the embedding.
        dense_layers: layers without experts.
    """

    fields: Mapping[str, object]
    names: tuple[Name, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    tied: bool
    dense_layers: frozenset[int] = field(default_factory=frozenset)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(str(self.fields["num_layers"]))

    @property
    def num_experts(self) -> int:
        """Number of experts of a mixture layer; 0 for a dense model."""
        return int(str(self.fields.get("num_moe_experts") or 0))

    def parameters(self) -> Iterator[tuple[Name, int, int]]:
        """Yield every parameter of the model: its table entry, layer and expert (0 where the entry has none)."""
        for name in self.names:
            for layer in range(self.num_layers) if "{layer}" in name.megatron else [0]:
                is_mlp = "layers.{layer}.mlp." in name.megatron
                if is_mlp and (layer in self.dense_layers) != name.megatron.startswith(DENSE_MLP):
                    continue
                for expert in range(self.num_experts) if name.is_expert else [0]:
                    yield name, layer, expert

    def hf_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that a checkpoint of this model must hold."""
        return {
            full: self.hf_shapes[pattern]
            for name, layer, expert in self.parameters()
            for pattern, full in zip(name.hf, name.hf_names(layer, expert), strict=True)
        }


DENSE_MLP = "decoder.layers.{layer}.mlp.linear_"
"""How the names of a dense layer's MLP begin."""
