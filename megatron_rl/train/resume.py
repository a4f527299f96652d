"""Which checkpoint a run would continue from, and whether it can: asked before any rank starts."""

import json
import re
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, DataError

META = "meta.json"
"""Written last: its presence makes a checkpoint valid."""


def checkpoint_folder(run: Run) -> Path:
    """Return where a run keeps its checkpoints."""
    return Path(run.log.path) / "checkpoints"


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the valid checkpoints, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{META}")]
    return sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))


def newest_checkpoint(run: Run) -> Path | None:
    """Return the newest valid checkpoint, None without one."""
    return next(reversed(valid_checkpoints(checkpoint_folder(run))), None)


def layout_record(run: Run, ranks: int) -> dict[str, object]:
    """Return what must be the same for a checkpoint to fit: sizes of the axes, ranks, precision."""
    return run.parallel.model_dump() | {"ranks": ranks, "dtype": run.model.dtype}


def check_resumable(run: Run, ranks: int) -> None:
    """Raise if the run is to be resumed and its newest checkpoint does not fit.

    Raises:
        ConfigError: it was written by another layout.
        DataError: its description cannot be read.
    """
    newest = newest_checkpoint(run) if run.train.resume else None
    if newest is None:
        return
    try:
        was, now = json.loads((newest / META).read_text())["layout"], layout_record(run, ranks)
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{newest / META} cannot be read: {error}; delete {newest} to use an older one") from error
    if was != now:
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        changes = ", ".join(f"{key} {was.get(key)} there and {now.get(key)} here" for key in keys)
        raise ConfigError(
            f"{newest} was written with another layout: {changes}; resume with the layout that wrote it, or start a new"
            " run from an exported checkpoint (model.path)"
        )
