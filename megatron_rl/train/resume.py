"""Which checkpoint a run would continue from, and whether it can: asked before any rank starts."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.policy.names import family_of, read_hf_config
from megatron_rl.policy.piece_files import PieceReader, check_model, index_pieces

META, INDEX, SAMPLER = "meta.json", "index.json", "sampler.json"


class Meta(BaseModel):
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


def checkpoint_folder(run: Run) -> Path:
    """Return where a run keeps its checkpoints."""
    return Path(run.log.path) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after this many rollout batches."""
    return f"step_{step:08}"


def step_of(folder: Path) -> int:
    """Return after how many rollout batches a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step_"))


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to the end, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{META}")]
    return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))


def newest_checkpoint(run: Run) -> Path | None:
    """Return the newest checkpoint, None without one."""
    return next(reversed(valid_checkpoints(checkpoint_folder(run))), None)


def layout_record(run: Run, ranks: int) -> dict[str, int | str | None]:
    """Return what must be the same for a run to go on bit for bit: sizes of the axes, ranks, precision."""
    return run.parallel.model_dump() | {"ranks": ranks, "dtype": run.model.dtype}


def read_meta(folder: Path) -> Meta:
    """Return what a checkpoint says of itself, after a look at the sizes of its files.

    Raises:
        DataError: a file is missing, cut off or not what was written.
    """
    try:
        meta = Meta.model_validate_json((folder / META).read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{folder / META} cannot be read: {first}; {or_older(folder)}") from error
    if meta.digest != meta.computed_digest():
        raise DataError(f"{folder / META} is not the file that was written; {or_older(folder)}")
    for name, size in meta.bytes.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problem = f"has {found} bytes, not {size}" if found is not None else "is not there"
            raise DataError(f"{path} is missing or not the file that was written: it {problem}; {or_older(folder)}")
    return meta


def read_checked(folder: Path, name: str, meta: Meta) -> bytes:
    """Return the bytes of a file that holds no tensors.

    Raises:
        DataError: it is not what was written.
    """
    content = (folder / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != meta.sha256.get(name):
        raise DataError(f"{folder / name} is missing or not the file that was written; {or_older(folder)}")
    return content


def open_pieces(folder: Path, meta: Meta) -> PieceReader:
    """Return a reader of a checkpoint's tensors."""
    return PieceReader(folder, index_pieces(read_checked(folder, INDEX, meta), folder / INDEX))


def or_older(folder: Path) -> str:
    """Return what to do about a damaged checkpoint, in words."""
    older = [path for path in valid_checkpoints(folder.parent) if path.name < folder.name]
    return f"delete {folder} to go on from {older[-1]}" if older else f"delete {folder}; there is no older one"


def check_resumable(run: Run) -> None:
    """Raise if the run is to be resumed and its newest checkpoint cannot be used: its layout may be any.

    Raises:
        DataError: a file is missing or cut off, or it is of another model.
    """
    newest = newest_checkpoint(run) if run.train.resume else None
    if newest is not None:
        check_model(open_pieces(newest, read_meta(newest)), family_of(read_hf_config(Path(run.model.path))))
