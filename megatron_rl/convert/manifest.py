"""The manifest of a converted checkpoint: name, file, shape, dtype and SHA-256 of each Hugging Face tensor."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_rl.errors import DataError
from megatron_rl.models.hf_mapping.rules import HFConfig
from megatron_rl.models.safetensor_files import DTYPES
from megatron_rl.models.torch_dist import MANIFEST, TensorChunk

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ManifestEntry(BaseModel):
    """A tensor of the Hugging Face checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    to: tuple[str, ...] = ()
    """Keys of the distributed checkpoint that hold its values."""


class Manifest(BaseModel):
    """The tensors and settings of a conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    conversion: str
    model_type: str
    fp8_block: tuple[int, int] | None = None
    tensors: tuple[ManifestEntry, ...]


class TensorChunks(BaseModel):
    """A tensor of the distributed checkpoint, with the chunks that one job has written."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[TensorChunk, ...]


class FileRecord(BaseModel):
    """Result of a job: manifest entries and, for a distributed checkpoint, the tensors in its file."""

    rows: tuple[ManifestEntry, ...]
    tensors: dict[str, TensorChunks] = {}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors files."""
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype with this name in safetensors files."""
    return DTYPES[name]


def write_manifest(
    folder: Path,
    hf: HFConfig,
    entries: Sequence[ManifestEntry],
    conversion: str,
    fp8_block: tuple[int, int] | None = None,
) -> Manifest:
    """Write and return the manifest of a conversion."""
    manifest = Manifest(
        format=1,
        conversion=conversion,
        model_type=hf["model_type"],
        fp8_block=fp8_block,
        tensors=tuple(entries),
    )
    lines = ",\n  ".join(entry.model_dump_json() for entry in manifest.tensors)
    head = json.dumps(manifest.model_dump(exclude={"tensors"}))[:-1]
    (folder / MANIFEST).write_text(f'{head}, "tensors": [\n  {lines}\n]}}\n', encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it has none.

    Raises:
        DataError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} is not a manifest: {error.errors()[0]['msg']}; remove it to convert without"
        ) from error
