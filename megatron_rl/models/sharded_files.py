"""Sharded tensors on disk: each rank writes the slices it holds, and ranks of another layout can read them.

A tensor is stored as the shards of the layout that wrote it. A shard is stored as one or more contiguous slices of its
flattened elements, because the distributed optimizer splits parameters at arbitrary elements. A reader with the same
tensor-parallel size reads the slices it needs. Any other reader merges all shards with the family's ``ShardRule`` and
shards the result again. Values are only moved, so every bit is preserved.

The files are safetensors. A JSON index lists the location and SHA-256 of every slice. Nothing is unpickled.
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
from megatron_rl.models.checkpoint_reader import MAX_LISTED
from megatron_rl.models.hf_mapping.rules import Family, ShardRule
from megatron_rl.util.atomic import flush_to_disk

Count = Annotated[int, Field(ge=0)]


class StateSlice(BaseModel):
    """A contiguous slice of the flattened elements of one shard of a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tensor: str
    """Kind (``model``, ``main``, ``exp_avg``, ``exp_avg_sq``, ``rng``) and name: ``main/output_layer.weight``."""
    shard: Count = 0
    """Index of the shard: the tensor-parallel rank."""
    shards: Annotated[int, Field(ge=1)] = 1
    """Number of shards."""
    shape: tuple[Count, ...]
    """Shape of the shard."""
    start: Count = 0
    """Index of the first element in the flattened shard."""


class SavedSlice(StateSlice):
    """A slice on disk: the tensor called ``tensor`` of a safetensors file."""

    count: Count
    """Number of elements."""
    dtype: Annotated[str, Field(pattern=r"^(float(16|32|64)|bfloat16|uint8|int(8|16|32|64))$")]
    """Name of the torch dtype."""
    file: Annotated[str, Field(pattern=r"^rank_\d+\.safetensors$")]
    """File name in the checkpoint's folder."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the bytes."""

    @property
    def stop(self) -> int:
        """Index after the last element in the flattened shard."""
        return self.start + self.count


_SLICES = TypeAdapter(list[SavedSlice])


def write_slices(folder: Path, rank: int, slices: Iterable[tuple[StateSlice, Tensor]]) -> list[SavedSlice]:
    """Write this rank's slices to one file, flushed to disk; return their index entries.

    The tensors must be one-dimensional, contiguous and on the CPU.
    """
    file = f"rank_{rank:05}.safetensors"
    tensors = {where.tensor: tensor for where, tensor in slices}
    save_file(tensors, folder / file)
    flush_to_disk(folder / file)
    return [
        SavedSlice(
            **where.model_dump(),
            count=len(tensor),
            dtype=str(tensor.dtype).removeprefix("torch."),
            file=file,
            sha256=_digest(tensor),
        )
        for where, tensor in slices
    ]


def index_json(slices: Sequence[SavedSlice]) -> str:
    """Return the index of some slices as JSON."""
    return _SLICES.dump_json(list(slices)).decode()


def parse_index(text: str | bytes, path: Path) -> list[SavedSlice]:
    """Return the slices listed in an index whose text was read from ``path``.

    Raises:
        DataError: the text is not an index.
    """
    try:
        return _SLICES.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is not a valid index: {first['msg']} {where and f'(at {where})'}") from error


class ShardedStateReader:
    """Reads any slice of any tensor. Every stored slice is checked against its SHA-256 before its values are used.

    At most one tensor is in memory at a time: one shard if the tensor-parallel size matches, else all shards and the
    merged tensor.
    """

    def __init__(self, folder: Path, slices: Iterable[SavedSlice]) -> None:
        self.folder = folder
        self._slices: dict[str, list[SavedSlice]] = {}
        self._files: dict[str, safe_open] = {}
        for entry in slices:
            self._slices.setdefault(entry.tensor, []).append(entry)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._slices

    def names(self, kind: str) -> set[str]:
        """Return the names of all tensors of a kind."""
        return {tensor.removeprefix(f"{kind}/") for tensor in self._slices if tensor.startswith(f"{kind}/")}

    def read(self, where: StateSlice, rule: ShardRule, count: int | None = None) -> Tensor:
        """Return ``count`` elements (default: the rest of the shard) from ``where.start`` on, one-dimensional.

        Raises:
            DataError: the tensor is missing, incomplete or of another shape, or a file was modified.
        """
        shards = self._shards(where.tensor)
        stop = math.prod(where.shape) if count is None else where.start + count
        if rule.dim is None or len(shards) == where.shards:
            slices = shards[0 if rule.dim is None else where.shard]
            _check_shape(where, slices[0].shape, self.folder)
            return self._elements(slices, where.start, stop)
        shard = rule.shard(self.merged(where.tensor, rule), where.shard, where.shards)
        _check_shape(where, tuple(shard.shape), self.folder)
        return shard.flatten()[where.start : stop]

    def merged(self, tensor: str, rule: ShardRule) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors of a parameter, or of its main values or Adam moments."""
        shards = self._shards(tensor)
        return rule.merge([self._elements(s, 0, math.prod(s[0].shape)).view(s[0].shape) for s in shards])

    def dtype(self, tensor: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return getattr(torch, self._shards(tensor)[0][0].dtype)

    def _shards(self, tensor: str) -> list[list[SavedSlice]]:
        """Return the slices of every shard, in order."""
        slices = self._slices.get(tensor)
        if not slices:
            raise DataError(f"the checkpoint {self.folder} has no tensor {tensor}")
        shards = [sorted((s for s in slices if s.shard == n), key=lambda s: s.start) for n in range(slices[0].shards)]
        kinds = {(entry.shards, entry.shape, entry.dtype) for entry in slices}
        if len(kinds) > 1 or not all(shards) or sum(map(len, shards)) != len(slices):
            raise DataError(f"the slices of {tensor} in {self.folder} are inconsistent")
        return shards

    def _elements(self, slices: Sequence[SavedSlice], start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of a flattened shard."""
        needed = [entry for entry in slices if entry.start < stop and entry.stop > start]
        is_contiguous = [entry.stop for entry in needed[:-1]] == [entry.start for entry in needed[1:]]
        if not needed or needed[0].start > start or needed[-1].stop < stop or not is_contiguous:
            raise DataError(f"the slices of {slices[0].tensor} in {self.folder} leave a gap or overlap")
        parts = [self._load(entry)[max(start - entry.start, 0) : stop - entry.start] for entry in needed]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _load(self, entry: SavedSlice) -> Tensor:
        path = self.folder / entry.file
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(path, framework="pt")
            file = self._files[entry.file]
            if file.get_slice(entry.tensor).get_shape() != [entry.count]:
                raise DataError(f"{path} was modified: {entry.tensor} has another size")
            values = file.get_tensor(entry.tensor)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is missing or was modified: {error}") from error
        if values.dtype is not getattr(torch, entry.dtype) or _digest(values) != entry.sha256:
            raise DataError(f"{path} was modified: {entry.tensor} has other values")
        return values


def check_model(reader: ShardedStateReader, family: Family) -> None:
    """Check the names of the saved parameters against the family's table.

    Raises:
        DataError: a parameter is missing or unknown.
    """
    found, expected = (
        reader.names("model"),
        {name.megatron_name(layer, expert) for name, layer, expert in family.parameters()},
    )
    problems = [f"missing: {name}" for name in sorted(expected - found)]
    problems += [f"extra: {name}" for name in sorted(found - expected)]
    if problems:
        shown = "\n  ".join(
            problems[:MAX_LISTED] + ([f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else [])
        )
        raise DataError(f"the checkpoint {reader.folder} belongs to another model than model.path:\n  {shown}")


def _check_shape(where: StateSlice, shape: Sequence[int], folder: Path) -> None:
    if tuple(shape) != where.shape:
        raise DataError(f"{where.tensor} in {folder} is {list(shape)}, the model has {list(where.shape)}")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
