"""Reads safetensors files by their header, a part of a tensor at a time, and trusts nothing in it unchecked.

The safetensors package maps whole files and cannot say where a tensor's bytes are; here memory holds what is asked for
and no more, and no size is allocated before it is known to be in the file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import DataError

MOST_HEADER_BYTES = 100_000_000
"""Limit of the format."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileTensor:
    """Where the bytes of a tensor, or of some of its rows, are.

    Attributes:
        offset: of the first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> "FileTensor":
        """Return ``count`` slices along the first dimension."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return FileTensor(self.path, self.dtype, (count, *self.shape[1:]), self.offset + first * row_bytes)

    def item(self, index: int) -> "FileTensor":
        """Return one slice along the first dimension, without that dimension."""
        one = self.rows(index, 1)
        return FileTensor(one.path, one.dtype, one.shape[1:], one.offset)

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            DataError: the file has become shorter than its header says.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        read_into(self.path, self.offset, buffer)
        return buffer.view(self.dtype).view(self.shape)


def read_into(path: Path, offset: int, buffer: Tensor) -> None:
    """Fill a uint8 tensor with the file's bytes from ``offset``.

    Raises:
        DataError: the file ends before.
    """
    view, done = buffer.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise DataError(f"{path} ends at byte {offset + done}; {len(view) - done} more were expected")
            done += count


def read_header(path: Path) -> dict[str, FileTensor]:
    """Return what is in a safetensors file and where.

    Raises:
        DataError: the header is not one, or does not describe exactly the bytes of the file.
    """
    try:
        return _read_header(path)
    except (OSError, ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error


def _read_header(path: Path) -> dict[str, FileTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        text = file.read(length)
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    extents = {name: _extent(path, name, entry, start, size) for name, entry in header.items()}
    end = start
    for name, extent in sorted(extents.items(), key=lambda pair: (pair[1].offset, pair[1].num_bytes)):
        if extent.offset != end:
            raise ValueError(f"tensor {name!r} begins at byte {extent.offset}, the one before ends at {end}")
        end += extent.num_bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return extents


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _extent(path: Path, name: str, entry: object, start: int, size: int) -> FileTensor:
    if not isinstance(entry, dict):
        raise ValueError(f"the header's entry for {name!r} is {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    sizes, places = _counts(shape), _counts(offsets)
    if sizes is None or places is None or len(places) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = places
    extent = FileTensor(path, DTYPES[dtype], sizes, start + begin)
    if end - begin != extent.num_bytes or start + end > size:
        raise ValueError(
            f"tensor {name!r} {list(sizes)} {dtype} needs {extent.num_bytes} bytes; its data_offsets {offsets} give "
            f"{end - begin} of the {size - start} in the file"
        )
    return extent


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of sizes; None if it is anything else."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        return None
    return tuple(value)
