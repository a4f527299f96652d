"""Reads safetensors files, or slices of their tensors, and validates the header.

The safetensors package maps whole files into memory and does not expose byte offsets. This module allocates only the
requested slice, after checking that the file contains it.
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

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileTensor:
    """The location of a tensor, or of a slice along its first dimension, in a file.

    Attributes:
        path: the file.
        dtype, shape: of the tensor or slice.
        offset: position of the first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> "FileTensor":
        """Return rows ``first`` to ``first + count`` along the first dimension."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return FileTensor(self.path, self.dtype, (count, *self.shape[1:]), self.offset + first * row_bytes)

    def item(self, index: int) -> "FileTensor":
        """Return one slice along the first dimension, without that dimension."""
        one = self.rows(index, 1)
        return FileTensor(one.path, one.dtype, one.shape[1:], one.offset)

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            DataError: the file is shorter than its header declares.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        read_into(self.path, self.offset, buffer)
        return buffer.view(self.dtype).view(self.shape)


def read_into(path: Path, offset: int, buffer: Tensor) -> None:
    """Fill a uint8 tensor with the bytes of a file, starting at ``offset``.

    Raises:
        DataError: the file is too short.
    """
    view, done = buffer.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise DataError(f"{path} ends at byte {offset + done}; {len(view) - done} more were expected")
            done += count


def read_header(path: Path) -> dict[str, FileTensor]:
    """Return the location of every tensor in a safetensors file.

    Raises:
        DataError: the header is invalid or does not account for every byte of the file.
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
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header length is {length} bytes, the file has {size}")
        text = file.read(length)
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _parse_entry(path, name, entry, start, size) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda pair: (pair[1].offset, pair[1].num_bytes)):
        if tensor.offset != end:
            raise ValueError(f"tensor {name!r} begins at byte {tensor.offset}, the previous one ends at {end}")
        end += tensor.num_bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return tensors


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _parse_entry(path: Path, name: str, entry: object, start: int, size: int) -> FileTensor:
    if not isinstance(entry, dict):
        raise ValueError(f"the header's entry for {name!r} is {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    sizes, bounds = _counts(shape), _counts(offsets)
    if sizes is None or bounds is None or len(bounds) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = bounds
    tensor = FileTensor(path, DTYPES[dtype], sizes, start + begin)
    if end - begin != tensor.num_bytes or start + end > size:
        raise ValueError(
            f"tensor {name!r} {list(sizes)} {dtype} needs {tensor.num_bytes} bytes; its data_offsets {offsets} "
            f"cover {end - begin} of the {size - start} bytes in the file"
        )
    return tensor


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of non-negative integers as a tuple; None for any other value."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        return None
    return tuple(value)
