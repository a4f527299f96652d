"""Tensors on disk in pieces, written by the ranks that hold them and read by ranks that hold other parts.

A tensor is stored as the shards of the layout that wrote it, a shard as one or more runs of its elements in row order
(the distributed optimizer cuts without regard to rows). A reader with the same number of tensor-parallel ranks takes
the runs it needs as they are; any other joins all shards by the family's table and cuts them again. Both only move
values.

Files are safetensors; an index in JSON says where every piece belongs and its SHA-256. Nothing is unpickled.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.hf_mapping.rules import Family, ShardRule
from megatron_rl.util.atomic import flush_to_disk

Count = Annotated[int, Field(ge=0)]


class StateSlice(BaseModel):
    """Where a run of elements belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tensor: str
    """Kind (``model``, ``main``, ``exp_avg``, ``exp_avg_sq``, ``rng``) and name: ``main/output_layer.weight``."""
    shard: Count = 0
    """The shard that the run is a part of, counted by tensor-parallel rank,"""
    shards: Annotated[int, Field(ge=1)] = 1
    """of so many."""
    shape: tuple[Count, ...]
    """Of the whole shard."""
    start: Count = 0
    """The run's first element, in row order of the shard."""


class SavedSlice(StateSlice):
    """A run of elements as it lies on disk, in the file's tensor of the same name."""

    count: Count
    """Elements."""
    dtype: Annotated[str, Field(pattern=r"^(float(16|32|64)|bfloat16|uint8|int(8|16|32|64))$")]
    """Name of the torch type."""
    file: Annotated[str, Field(pattern=r"^rank_\d+\.safetensors$")]
    """In the checkpoint's folder, never elsewhere."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the elements' bytes."""

    @property
    def stop(self) -> int:
        """One past the run's last element."""
        return self.start + self.count


_PIECES = TypeAdapter(list[SavedSlice])


def write_slices(folder: Path, rank: int, pieces: Iterable[tuple[StateSlice, Tensor]]) -> list[SavedSlice]:
    """Write this rank's pieces to a file of its own, and to the disk itself; return what the index says of them.

    The tensors are flat, contiguous and on the CPU.
    """
    file = f"rank_{rank:05}.safetensors"
    tensors = {place.tensor: tensor for place, tensor in pieces}
    save_file(tensors, folder / file)
    flush_to_disk(folder / file)
    return [
        SavedSlice(
            **place.model_dump(),
            count=len(tensor),
            dtype=str(tensor.dtype).removeprefix("torch."),
            file=file,
            sha256=_digest(tensor),
        )
        for place, tensor in pieces
    ]


def index_json(pieces: Sequence[SavedSlice]) -> str:
    """Return the index of some pieces as JSON."""
    return _PIECES.dump_json(list(pieces)).decode()


def parse_index(text: str | bytes, path: Path) -> list[SavedSlice]:
    """Return the pieces of an index that was read from ``path``.

    Raises:
        DataError: it is not an index.
    """
    try:
        return _PIECES.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is not an index of pieces: {first['msg']} {where and f'(at {where})'}") from error


class ShardedStateReader:
    """Reads any part of any tensor from pieces, each checked against its SHA-256 before a value of it is used.

    At most one tensor is in memory at once: a shard if the layout fits, else all of its shards and the merged whole.
    """

    def __init__(self, folder: Path, pieces: Iterable[SavedSlice]) -> None:
        self.folder = folder
        self._pieces: dict[str, list[SavedSlice]] = {}
        self._files: dict[str, safe_open] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.tensor, []).append(piece)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._pieces

    def names(self, kind: str) -> set[str]:
        """Return the names of all tensors of a kind."""
        return {tensor.removeprefix(f"{kind}/") for tensor in self._pieces if tensor.startswith(f"{kind}/")}

    def read(self, place: StateSlice, layout: ShardRule, count: int | None = None) -> Tensor:
        """Return the elements from ``place`` on, flat: ``count`` of them, without it the rest of the shard.

        Raises:
            DataError: the tensor is not there, not whole or of another shape, or a file was changed.
        """
        found = self._shards(place.tensor)
        stop = math.prod(place.shape) if count is None else place.start + count
        if layout.dim is None or len(found) == place.shards:
            shard = found[0 if layout.dim is None else place.shard]
            _check_shape(place, shard[0].shape, self.folder)
            return self._elements(shard, place.start, stop)
        shard = layout.shard(self.merged(place.tensor, layout), place.shard, place.shards)
        _check_shape(place, tuple(shard.shape), self.folder)
        return shard.flatten()[place.start : stop]

    def merged(self, tensor: str, layout: ShardRule) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors (or what belongs to their elements, such as Adam's moments)."""
        shards = self._shards(tensor)
        return layout.merge([self._elements(s, 0, math.prod(s[0].shape)).view(s[0].shape) for s in shards])

    def dtype(self, tensor: str) -> torch.dtype:
        """Return the type of a tensor's elements."""
        return getattr(torch, self._shards(tensor)[0][0].dtype)

    def _shards(self, tensor: str) -> list[list[SavedSlice]]:
        """Return the pieces of every shard, in order."""
        pieces = self._pieces.get(tensor)
        if not pieces:
            raise DataError(f"the checkpoint {self.folder} has no tensor {tensor}")
        shards = [sorted((p for p in pieces if p.shard == n), key=lambda p: p.start) for n in range(pieces[0].shards)]
        same = {(piece.shards, piece.shape, piece.dtype) for piece in pieces}
        if len(same) > 1 or not all(shards) or sum(map(len, shards)) != len(pieces):
            raise DataError(f"the pieces of {tensor} in {self.folder} do not fit together")
        return shards

    def _elements(self, pieces: Sequence[SavedSlice], start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of a shard."""
        needed = [piece for piece in pieces if piece.start < stop and piece.stop > start]
        joined = [piece.stop for piece in needed[:-1]] == [piece.start for piece in needed[1:]]
        if not needed or needed[0].start > start or needed[-1].stop < stop or not joined:
            raise DataError(f"the pieces of {pieces[0].tensor} in {self.folder} leave a gap or overlap")
        parts = [self._load(piece)[max(start - piece.start, 0) : stop - piece.start] for piece in needed]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _load(self, piece: SavedSlice) -> Tensor:
        path = self.folder / piece.file
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(path, framework="pt")
            file = self._files[piece.file]
            if file.get_slice(piece.tensor).get_shape() != [piece.count]:
                raise DataError(f"{path} is not the file that was written: {piece.tensor} has another size")
            values = file.get_tensor(piece.tensor)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is missing or not the file that was written: {error}") from error
        if values.dtype is not getattr(torch, piece.dtype) or _digest(values) != piece.sha256:
            raise DataError(f"{path} is missing or not the file that was written: {piece.tensor} has other values")
        return values


def check_model(reader: ShardedStateReader, family: Family) -> None:
    """Compare the names of the saved parameters with the model's.

    Raises:
        DataError: any is missing or unknown.
    """
    found, expected = (
        reader.names("model"),
        {name.megatron_name(layer, expert) for name, layer, expert in family.parameters()},
    )
    problems = [f"missing: {name}" for name in sorted(expected - found)]
    problems += [f"extra: {name}" for name in sorted(found - expected)]
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise DataError(f"the checkpoint {reader.folder} is of another model than model.path:\n  {shown}")


def _check_shape(place: StateSlice, shape: Sequence[int], folder: Path) -> None:
    if tuple(shape) != place.shape:
        raise DataError(f"{place.tensor} in {folder} is {list(shape)}, the model has {list(place.shape)}")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
