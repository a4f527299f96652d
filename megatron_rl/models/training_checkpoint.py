"""The folder of a training checkpoint: what it says of itself, and its weights as a ``CheckpointReader``."""

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

META, INDEX, SAMPLER = "meta.json", "index.json", "sampler.json"


class CheckpointMeta(BaseModel):
    """What ``meta.json`` says of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal[2]
    """Of the files; 1 were per-rank files that only their own layout could read."""
    step: Annotated[int, Field(ge=0)]
    """Rollout batches seen."""
    updates: Annotated[int, Field(ge=0)]
    """Optimizer steps taken."""
    layout: dict[str, int | str | None]
    """What wrote it: sizes of the axes, ranks, precision."""
    bytes: dict[str, int]
    """Size of every other file."""
    sha256: dict[str, str]
    """Of the files that hold no tensors; those of tensors are in the index."""
    digest: str = ""
    """SHA-256 of all of the above."""

    def computed_digest(self) -> str:
        """Return what ``digest`` must be."""
        text = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def step_of(folder: Path) -> int:
    """Return after how many rollout batches a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step_"))


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to the end, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{META}")]
    return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))


def read_meta(folder: Path) -> CheckpointMeta:
    """Return what a checkpoint says of itself, after a look at the sizes of its files.

    Raises:
        DataError: a file is missing, cut off or not what was written.
    """
    try:
        meta = CheckpointMeta.model_validate_json((folder / META).read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{folder / META} cannot be read: {first}; {repair_hint(folder)}") from error
    if meta.digest != meta.computed_digest():
        raise DataError(f"{folder / META} is not the file that was written; {repair_hint(folder)}")
    for name, size in meta.bytes.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problem = f"has {found} bytes, not {size}" if found is not None else "is not there"
            raise DataError(f"{path} is missing or not the file that was written: it {problem}; {repair_hint(folder)}")
    return meta


def read_checked(folder: Path, name: str, meta: CheckpointMeta) -> bytes:
    """Return the bytes of a file that holds no tensors.

    Raises:
        DataError: it is not what was written.
    """
    content = (folder / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != meta.sha256.get(name):
        raise DataError(f"{folder / name} is missing or not the file that was written; {repair_hint(folder)}")
    return content


def open_sharded_state(folder: Path, meta: CheckpointMeta) -> ShardedStateReader:
    """Return a reader of a checkpoint's tensors."""
    return ShardedStateReader(folder, parse_index(read_checked(folder, INDEX, meta), folder / INDEX))


def repair_hint(folder: Path) -> str:
    """Return what to do about a damaged checkpoint, in words."""
    older = [path for path in valid_checkpoints(folder.parent) if path.name < folder.name]
    return f"delete {folder} to go on from {older[-1]}" if older else f"delete {folder}; there is no older one"


class TrainingCheckpointReader(CheckpointReader):
    """The weights of a training checkpoint under Hugging Face names."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder = folder
        self.reader = open_sharded_state(folder, read_meta(folder))
        places = {
            name.megatron_name(layer, expert): (name, layer, expert) for name, layer, expert in family.parameters()
        }
        self._parts: dict[str, tuple[str, ParamMapping, int]] = {}
        specs: dict[str, TensorSpec] = {}
        for saved in sorted(self.reader.names("model")):
            if saved not in places:
                raise DataError(f"the checkpoint {folder} does not fit its config.json: extra: {saved}")
            name, layer, expert = places[saved]
            dtype = self.reader.dtype(f"model/{saved}")
            for part, (hf_name, shape) in enumerate(zip(name.hf_names(layer, expert), name.shapes, strict=True)):
                self._parts[hf_name] = saved, name, part
                specs[hf_name] = TensorSpec(shape, dtype)
        self.specs = specs
        self._last: tuple[str, tuple[Tensor, ...]] = "", ()

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in memory of its own."""
        saved, entry, part = self._parts[name]
        if self._last[0] != saved:  # the parts of a tensor are mostly asked for one after the other
            self._last = saved, self.reader.merged(f"model/{saved}", entry.rule)
        found = self._last[1][part]
        if tuple(found.shape) != self.specs[name].shape:
            expected = list(self.specs[name].shape)
            raise DataError(f"model/{saved} in {self.folder}: {name} is {list(found.shape)}, expected {expected}")
        return found.contiguous().clone()
