"""From the words of the command line to what is evaluated: weights, the settings to ask with, and where results go.

RUN                            a run folder: its newest weights, its own settings
RUN/checkpoints/step_00000020  a training checkpoint, RUN/exports/step_... and RUN/export likewise
FOLDER                         a checkpoint of any other kind, with the settings of the config files given
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import Loaded, load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.training_checkpoint import step_of, valid_checkpoints
from megatron_rl.observability.run_folder import CONFIG

RESULTS = "eval"
"""Folder of results: in the run folder, or where the command runs."""


@dataclass(frozen=True)
class WeightsLocation:
    """Weights on disk.

    Attributes:
        weights: the folder that holds them.
        step: rollout batches they were trained on; 0 where nobody says.
        run: the run folder that they are of, if they are of one.
    """

    weights: Path
    step: int = 0
    run: Path | None = None


@dataclass(frozen=True)
class Target:
    """One set of weights to evaluate.

    Attributes:
        loaded: the settings; ``model.path`` is where the weights are.
        step: rollout batches they were trained on.
        output: the folder of results.
    """

    loaded: Loaded[Run]
    step: int
    output: Path

    @property
    def run(self) -> Run:
        """The settings."""
        return self.loaded.run


def find_targets(words: Sequence[str], settings: Sequence[str], output: Path | None) -> list[Target]:
    """Return what to evaluate: each folder, or without any the ``model.path`` of the config files.

    Args:
        words: config files and folders.
        settings: ``key=value`` words.
        output: the folder of results, or with several targets the folder that theirs are in; None: beside the weights.

    Raises:
        ConfigError: nothing to evaluate, or two results would go to one folder.
        DataError: a folder holds no weights.
    """
    folders = list(dict.fromkeys(Path(word) for word in words if Path(word).is_dir()))
    files = [word for word in words if not Path(word).is_dir()]
    if not folders:
        loaded = load(Run, files, settings)
        path = Path(loaded.run.model.path)
        return [Target(loaded, 0, output or Path(RESULTS) / path.name)]
    places = [find_weights(folder) for folder in folders]
    targets = [
        Target(_load(place, files, settings), place.step, _output(place, output, alone=len(places) == 1))
        for place in places
    ]
    for number, target in enumerate(targets):
        if any(target.output == other.output for other in targets[:number]):
            raise ConfigError(
                f"the results of two folders would go to {target.output}; evaluate them apart, each with its --output"
            )
    return targets


def find_weights(folder: Path) -> WeightsLocation:
    """Return the weights that a folder names.

    Raises:
        DataError: a run folder without weights.
    """
    if is_run(folder):
        return _newest(folder)
    if folder.name == "export" and is_run(folder.parent):
        return WeightsLocation(folder, _steps(folder.parent), folder.parent)
    if re.fullmatch(r"step_\d+", folder.name) and is_run(folder.parent.parent):
        return WeightsLocation(folder, step_of(folder), folder.parent.parent)
    return WeightsLocation(folder)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: its ``config.json`` is ours and no model's."""
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return False
    return isinstance(found, dict) and {"model", "task", "train"} <= set(found)


def _newest(run: Path) -> WeightsLocation:
    """Return the newest weights of a run: as Hugging Face files, which every engine can read, where there are some."""
    checkpoints = valid_checkpoints(run / "checkpoints")
    exports = {step_of(path): path for path in (run / "exports").glob("step_*") if path.name[5:].isdigit()}
    final = run / "export"
    newest = max([step_of(path) for path in checkpoints[-1:]] + list(exports), default=None)
    if final.is_dir() and newest in (None, _steps(run)):
        return WeightsLocation(final, _steps(run), run)
    if newest is None:
        raise DataError(f"{run} holds no weights yet: no checkpoint, no export; give another folder")
    return WeightsLocation(exports.get(newest, run / "checkpoints" / f"step_{newest:08}"), newest, run)


def _steps(run: Path) -> int:
    return int(json.loads((run / CONFIG).read_text(encoding="utf-8"))["train"]["steps"])


def _load(place: WeightsLocation, files: Sequence[str], settings: Sequence[str]) -> Loaded[Run]:
    """Return the settings: the run's own, config files over them, words over those."""
    base = place.run / CONFIG if place.run else None
    own = [f"model.path={json.dumps(str(place.weights.absolute()))}"]
    if clash := [word for word in settings if word.partition("=")[0].strip() == "model.path"]:
        raise ConfigError(f"{clash[0]} (command line), but {place.weights} is to be evaluated; leave one out")
    loaded = load(Run, [*([str(base)] if base else []), *files], [*settings, *own])
    run = loaded.run
    if loaded.origin("rollout.registry") == str(base):  # of a Slurm job's servers, which ended with it
        run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"registry": ""})})
    return Loaded(run, loaded.origins)


def _output(place: WeightsLocation, output: Path | None, *, alone: bool) -> Path:
    name = f"step_{place.step:08}" if place.run else place.weights.absolute().name
    if output is not None:
        return output if alone else output / name
    return (place.run or Path()) / RESULTS / name
