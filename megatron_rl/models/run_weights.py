"""The weights of a run folder: its training checkpoints and exports, by step."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.saved_run import CONFIG, is_run
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.training_checkpoint import step_of, valid_checkpoints


@dataclass(frozen=True)
class WeightsLocation:
    """Weights on disk.

    Attributes:
        weights: folder of the weights.
        step: number of rollout batches that they were trained on; 0 if unknown.
        run: run folder that they belong to; None if there is none.
    """

    weights: Path
    step: int = 0
    run: Path | None = None


def find_weights(folder: Path, step: int | None = None) -> WeightsLocation:
    """Return the weights in a folder; of a run folder those of a step, by default the newest.

    Raises:
        ConfigError: there is a step, but the folder is not a run folder.
        DataError: a run folder has no weights, or none of this step.
    """
    if is_run(folder):
        return _weights_of_run(folder, step)
    _refuse_step(folder, step)
    if folder.name == "export" and is_run(folder.parent):
        return WeightsLocation(folder, _steps(folder.parent), folder.parent)
    if re.fullmatch(r"step_\d+", folder.name) and is_run(folder.parent.parent):
        return WeightsLocation(folder, step_of(folder), folder.parent.parent)
    return WeightsLocation(folder)


def find_training_checkpoint(folder: Path, step: int | None = None) -> Path:
    """Return the training checkpoint of a step of a run folder, by default the newest; other folders as they are.

    Raises:
        ConfigError: there is a step, but the folder is not a run folder.
        DataError: the run has no checkpoint, or none of this step.
    """
    if not is_run(folder):
        _refuse_step(folder, step)
        return folder
    checkpoints = {step_of(path): path for path in valid_checkpoints(folder / "checkpoints")}
    chosen = max(checkpoints, default=None) if step is None else step
    if chosen in checkpoints:
        return checkpoints[chosen]
    exports = _exports(folder)
    if step is None and exports:
        raise DataError(
            f"{folder} has no training checkpoint; its weights are in Hugging Face format already:"
            f" {exports[max(exports)]}"
        )
    if step in exports:
        raise DataError(f"the weights of step {step} are in Hugging Face format already: {exports[step]}")
    raise DataError(_no_weights(folder, step, checkpoints, "training checkpoint"))


def _weights_of_run(run: Path, step: int | None) -> WeightsLocation:
    """Return the weights of a step, preferring Hugging Face files, which every engine can read."""
    found = {step_of(path): path for path in valid_checkpoints(run / "checkpoints")} | _exports(run)
    chosen = max(found, default=None) if step is None else step
    if chosen is None or chosen not in found:
        raise DataError(_no_weights(run, step, found, "checkpoint and no export"))
    return WeightsLocation(found[chosen], chosen, run)


def _exports(run: Path) -> dict[int, Path]:
    """Return the exports of a run by step; the final one only if no other weights contradict its step."""
    exports = {step_of(path): path for path in (run / "exports").glob("step_*") if path.name[5:].isdigit()}
    final, last = run / "export", _steps(run)
    steps = [*exports, *map(step_of, valid_checkpoints(run / "checkpoints"))]
    return exports | ({last: final} if final.is_dir() and max(steps, default=last) == last else {})


def _no_weights(run: Path, step: int | None, found: Collection[int], kind: str) -> str:
    if not found:
        return f"{run} has no weights yet: no {kind}; give another folder, or set checkpoint.every"
    return f"{run} has no {kind} of step {step}; there are steps {', '.join(map(str, sorted(found)))}"


def _refuse_step(folder: Path, step: int | None) -> None:
    if step is not None:
        raise ConfigError(f"--step {step} chooses a checkpoint of a run folder, but {folder} is not one; leave it out")


def _steps(run: Path) -> int:
    return int(json.loads((run / CONFIG).read_text(encoding="utf-8"))["train"]["steps"])
