"""Reads and writes megatron-core's distributed checkpoint format (``torch_dist``) without megatron-core.

A folder contains ``*.distcp`` files (tensors concatenated as ``torch.save`` writes them), ``.metadata`` (the location
of every chunk of every tensor), ``metadata.json`` (name and version of the format) and ``common.pt``. ``.metadata`` is
a pickle. It is loaded by a restricted unpickler that only accepts the plain classes that belong in it, and every number
in it is validated before use.
"""

import io
import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_rl.errors import DataError

METADATA, FORMAT, COMMON = ".metadata", "metadata.json", "common.pt"
MANIFEST = "manifest.json"
"""File in which a conversion records the SHA-256 of each Hugging Face tensor."""
MAX_OVERHEAD_BYTES = 1 << 16
"""Maximum number of bytes that ``torch.save`` adds to those of a tensor."""

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}
_DTYPES = {name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _RestrictedUnpickler(pickle.Unpickler):
    """Accepts the classes of ``.metadata`` and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in it")


@dataclass(frozen=True)
class TensorChunk:
    """A rectangular part of a tensor.

    Attributes:
        start: index of its first element per dimension.
        shape: its shape.
        file: name of the file in the checkpoint's folder.
        offset, length: position and size in the file, bytes.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: shape, dtype, and the chunks that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[TensorChunk, ...]


def is_torch_dist(folder: Path) -> bool:
    """Return whether the folder contains a torch_dist checkpoint."""
    return (folder / METADATA).is_file()


def write_tensor(file: BinaryIO, name: str, start: Sequence[int], tensor: Tensor) -> TensorChunk:
    """Append a chunk of a tensor to the open ``.distcp`` file called ``name``; return its location."""
    offset = file.tell()
    compact = tensor.contiguous()
    if compact.untyped_storage().nbytes() != compact.nbytes:
        compact = compact.clone()  # torch.save writes the whole storage of a view
    torch.save(compact, file)
    return TensorChunk(tuple(start), tuple(tensor.shape), name, offset, file.tell() - offset)


def write_metadata(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the metadata files with which megatron-core and torch can load the ``.distcp`` files of a folder."""
    state: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for name, saved in tensors.items():
        chunks = [dcp.ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.shape)) for c in saved.chunks]
        properties = dcp.TensorProperties(dtype=saved.dtype)
        state[name] = dcp.TensorStorageMetadata(properties, torch.Size(saved.shape), chunks)
        for index, chunk in enumerate(saved.chunks):
            where = _StorageInfo(chunk.file, chunk.offset, chunk.length)
            storage[dcp.MetadataIndex(name, chunk.start, index)] = where
    metadata = dcp.Metadata(state, planner_data={name: (name,) for name in tensors}, storage_data=storage)
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, folder / COMMON)
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / FORMAT).write_text(json.dumps({**versions, "common_backend": "torch", "common_backend_version": 1}))


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint; other objects in it are ignored.

    Raises:
        DataError: the folder contains no such checkpoint, it is damaged, or it names an unexpected class or file.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        return _checked(folder, metadata)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is not the metadata of a distributed checkpoint: {error}") from error


def _checked(folder: Path, metadata: dcp.Metadata) -> dict[str, StoredTensor]:
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    where: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {}
    for index, info in metadata.storage_data.items():
        where[index.fqn, _counts(index.offset or ())] = info
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp.TensorStorageMetadata):
            continue
        shape, dtype = _counts(entry.size), entry.properties.dtype
        chunks = []
        for part in entry.chunks:
            info = where[name, _counts(part.offsets)]
            chunk = TensorChunk(
                _counts(part.offsets), _counts(part.sizes), info.relative_path, info.offset, info.length
            )
            _check_chunk(name, shape, dtype, chunk, sizes)
            chunks.append(chunk)
        if len({c.start for c in chunks}) < len(chunks) or sum(map(_volume, chunks)) != math.prod(shape):
            raise DataError(f"the parts of {name} {list(shape)} in {folder / METADATA} overlap or leave a gap")
        tensors[str(name)] = StoredTensor(shape, dtype, tuple(chunks))
    return tensors


def _volume(chunk: TensorChunk) -> int:
    return math.prod(chunk.shape)


def _counts(values: Iterable[int]) -> tuple[int, ...]:
    counts = tuple(int(value) for value in values)
    if any(not 0 <= count < 1 << 62 for count in counts):
        raise ValueError(f"{counts} are not valid sizes")
    return counts


def _check_chunk(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, chunk: TensorChunk, sizes: Mapping[str, int]
) -> None:
    inside = len(chunk.start) == len(chunk.shape) == len(shape) and all(
        start + size <= full for start, size, full in zip(chunk.start, chunk.shape, shape, strict=True)
    )
    if not inside:
        raise DataError(
            f"{name} {list(shape)} has a part {list(chunk.shape)} at {list(chunk.start)}, outside of the tensor"
        )
    if chunk.file not in sizes:
        raise DataError(f"{name} is in {chunk.file!r}, which is not a *.distcp file in the checkpoint's folder")
    _counts((chunk.offset, chunk.length))
    if chunk.offset + chunk.length > sizes[chunk.file]:
        raise DataError(
            f"{name} is in {chunk.file} at bytes {chunk.offset} to {chunk.offset + chunk.length}; "
            f"the file has {sizes[chunk.file]}"
        )
    expected = _volume(chunk) * dtype.itemsize
    if not expected <= chunk.length <= expected + MAX_OVERHEAD_BYTES:
        raise DataError(f"a part {list(chunk.shape)} {dtype} of {name} has {chunk.length} bytes, expected {expected}")


def read_region(folder: Path, name: str, saved: StoredTensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the region of a tensor with this start and shape, assembled from the chunks that overlap it.

    Raises:
        DataError: a chunk cannot be read or does not match the metadata.
    """
    region = None
    filled = 0
    for chunk in saved.chunks:
        low = [max(a, b) for a, b in zip(chunk.start, start, strict=True)]
        ends = zip(chunk.start, chunk.shape, start, shape, strict=True)
        high = [min(a + size, b + length) for a, size, b, length in ends]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        part = _read_chunk(folder, name, saved.dtype, chunk)
        part = part[_slices(low, high, chunk.start)]
        filled += part.numel()
        if part.shape == torch.Size(shape):
            return part
        if region is None:
            region = torch.empty(tuple(shape), dtype=saved.dtype)
        region[_slices(low, high, start)] = part
    if region is None or filled != region.numel():
        raise DataError(f"{name} {list(saved.shape)} in {folder} does not cover {list(shape)} at {list(start)}")
    return region


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - zero, b - zero) for a, b, zero in zip(low, high, origin, strict=True))


def _read_chunk(folder: Path, name: str, dtype: torch.dtype, chunk: TensorChunk) -> Tensor:
    path = folder / chunk.file
    with path.open("rb") as file:
        file.seek(chunk.offset)
        stream = io.BytesIO(file.read(chunk.length))
    try:
        tensor = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything
        raise DataError(f"{name} in {path} at byte {chunk.offset} cannot be read: {error}") from error
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != chunk.shape:
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DataError(f"{name} in {path} at byte {chunk.offset} is {found}, not {dtype} {list(chunk.shape)}")
    return tensor
