"""Columns of a batch as bytes that another process maps, and text beside them."""

import mmap
from collections.abc import Sequence

import torch

from megatron_rl.data.types import Columns

ColumnHeader = Sequence[tuple[str, str, Sequence[int]]]
"""Name, dtype and shape of each column, as JSON."""

_ALIGNMENT = 64


def encode_columns(columns: Columns) -> tuple[ColumnHeader, list[memoryview]]:
    """Return the header of columns, and their bytes, each padded to 64 bytes."""
    header: list[tuple[str, str, Sequence[int]]] = []
    parts: list[memoryview] = []
    for name, column in columns.items():
        header.append((name, str(column.dtype).removeprefix("torch."), list(column.shape)))
        data = column.contiguous().reshape(-1).view(torch.uint8).numpy().data
        parts += [data, memoryview(bytes(-data.nbytes % _ALIGNMENT))]
    return header, parts


def decode_columns(header: ColumnHeader, data: bytearray | mmap.mmap) -> Columns:
    """Return the columns of ``encode_columns``; they are views of the data."""
    columns: dict[str, torch.Tensor] = {}
    start = 0
    for name, dtype, shape in header:
        column = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        if column.numel():
            flat = torch.frombuffer(data, dtype=column.dtype, count=column.numel(), offset=start)
            columns[name] = flat.reshape(column.shape)
        else:
            columns[name] = column
        start += -(-column.nbytes // _ALIGNMENT) * _ALIGNMENT
    return columns


def text_column(text: str) -> torch.Tensor:
    """Return a text as a column of bytes."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def text_of(column: torch.Tensor) -> str:
    """Return the text of a column of bytes."""
    return column.numpy().tobytes().decode("utf-8", "surrogatepass")
