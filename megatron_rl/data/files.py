"""Saving and loading batches as safetensors files."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.data.types import Batch


def save_batch(batch: Batch, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a batch to a safetensors file.

    Args:
        batch: the batch; its columns are copied to the CPU.
        path: the file to write.
        metadata: text for the header of the file; None: nothing.
    """
    columns = {name: column.detach().cpu().clone().contiguous() for name, column in batch.columns.items()}
    save_file({"lengths_B": batch.lengths_B, **columns}, path, metadata=dict(metadata or {}))


def load_batch(path: Path) -> Batch:
    """Load a batch from a file written by ``save_batch``."""
    columns = cast(dict[str, Tensor], load_file(path))
    return Batch(columns.pop("lengths_B"), columns)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a file written by ``save_batch``."""
    with safe_open(path, framework="pt") as reader:
        return dict(reader.metadata() or {})
