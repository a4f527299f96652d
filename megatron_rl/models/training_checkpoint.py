"""Training checkpoint folders: metadata, integrity checks, and a reader for the weights."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_reader import CheckpointReader, TensorSpec
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping
from megatron_rl.models.sharded_files import ShardedStateReader, parse_index

META, INDEX, SAMPLER, LOSS = "meta.json", "index.json", "sampler.json", "loss.json"


class CheckpointMeta(BaseModel):
    """Content of ``meta.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[2]
    """Version of the file format."""
    step: Annotated[int, Field(ge=0)]
    """Rollout batches trained on."""
    updates: Annotated[int, Field(ge=0)]
    """Optimizer steps taken."""
    layout: dict[str, int | str | None]
    """Layout of the run that wrote the checkpoint: sizes of the mesh axes, ranks, precision."""
    bytes: dict[str, int]
    """Size of every other file, bytes."""
    sha256: dict[str, str]
    """SHA-256 of the files without tensors; the index has those of tensors."""
    digest: str = ""
    """SHA-256 of all fields above."""

    def computed_digest(self) -> str:
        """Return the correct value of ``digest``."""
        text = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def step_of(folder: Path) -> int:
    """Return the number of rollout batches before a checkpoint, from its folder name."""
    return int(folder.name.removeprefix("step_"))


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{META}")]
    return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))


def read_meta(folder: Path) -> CheckpointMeta:
    """Return the metadata of a checkpoint after checking the sizes of its files.

    Raises:
        DataError: a file is missing, truncated or modified.
    """
    try:
        meta = CheckpointMeta.model_validate_json((folder / META).read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{folder / META} cannot be read: {first}; {repair_hint(folder)}") from error
    if meta.digest != meta.computed_digest():
        raise DataError(f"{folder / META} was modified; {repair_hint(folder)}")
    for name, size in meta.bytes.items():
        path = _inside(folder, name)
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"was modified: it has {found} bytes, not {size}"
            raise DataError(f"{path} {problem}; {repair_hint(folder)}")
    return meta


def read_checked(folder: Path, name: str, meta: CheckpointMeta) -> bytes:
    """Return the bytes of a file without tensors.

    Raises:
        DataError: the file was modified.
    """
    content = _inside(folder, name).read_bytes()
    if hashlib.sha256(content).hexdigest() != meta.sha256.get(name):
        raise DataError(f"{folder / name} was modified; {repair_hint(folder)}")
    return content


def _inside(folder: Path, name: str) -> Path:
    """Return a file of the folder or of one of its folders; the metadata cannot name any other."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{folder / META} names the file {name!r}, which is not in the folder; {repair_hint(folder)}")
    return folder / path


def open_sharded_state(folder: Path, meta: CheckpointMeta) -> ShardedStateReader:
    """Return a reader for the tensors of a checkpoint."""
    return ShardedStateReader(folder, parse_index(read_checked(folder, INDEX, meta), folder / INDEX))


def repair_hint(folder: Path) -> str:
    """Return what a user can do about a damaged checkpoint, for error messages."""
    older = [path for path in valid_checkpoints(folder.parent) if path.name < folder.name]
    return f"delete {folder} to continue from {older[-1]}" if older else f"delete {folder}; there is no older one"


class TrainingCheckpointReader(CheckpointReader):
    """Reads the weights of a training checkpoint under Hugging Face names."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, meta = folder, read_meta(folder)
        for name in meta.sha256:
            read_checked(folder, name, meta)
        self.reader = open_sharded_state(folder, meta)
        known = {entry[0].megatron_name(*entry[1:]): entry for entry in family.parameters()}
        self._parts: dict[str, tuple[str, ParamMapping, int]] = {}
        specs: dict[str, TensorSpec] = {}
        for saved in sorted(self.reader.names("model")):
            if saved not in known:
                raise DataError(f"the checkpoint {folder} does not fit its config.json: extra: {saved}")
            mapping, layer, expert = known[saved]
            dtype = self.reader.dtype(f"model/{saved}")
            for part, (hf_name, shape) in enumerate(zip(mapping.hf_names(layer, expert), mapping.shapes, strict=True)):
                self._parts[hf_name] = saved, mapping, part
                specs[hf_name] = TensorSpec(shape, dtype)
        self.specs = specs
        self._last: tuple[str, tuple[Tensor, ...]] = "", ()

    def read(self, name: str) -> Tensor:
        """Return a tensor. The other parts of the same Megatron parameter are cached until the next call."""
        saved, mapping, part = self._parts[name]
        if self._last[0] != saved:
            self._last = saved, self.reader.merged(f"model/{saved}", mapping.rule)
        found = self._last[1][part]
        if tuple(found.shape) != self.specs[name].shape:
            expected = list(self.specs[name].shape)
            raise DataError(f"model/{saved} in {self.folder}: {name} is {list(found.shape)}, expected {expected}")
        return found.contiguous().clone()
