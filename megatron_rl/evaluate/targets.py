"""Targets of an evaluation from the command line: weights, settings, and folder of results.

RUN                            a run folder: its newest weights and its settings
RUN/checkpoints/step_00000020  a training checkpoint, with the settings of its run; likewise exports/step_..., export
FOLDER                         any other checkpoint, with the settings of the given configuration files
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import Loaded, load
from megatron_rl.config.saved_run import CONFIG
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.models.run_weights import WeightsLocation, find_weights

RESULTS = "eval"
"""Folder of results in the run folder or, without one, in the working directory."""


@dataclass(frozen=True)
class Target:
    """One set of weights to evaluate.

    Attributes:
        loaded: the configuration; ``model.path`` is the folder of the weights.
        step: number of rollout batches that they were trained on.
        output: folder of the results.
    """

    loaded: Loaded[Run]
    step: int
    output: Path

    @property
    def run(self) -> Run:
        """The configuration."""
        return self.loaded.run


def find_targets(
    words: Sequence[str], settings: Sequence[str], output: Path | None, step: int | None = None
) -> list[Target]:
    """Return a target for each folder or, without folders, one for ``model.path`` of the configuration files.

    Args:
        words: configuration files and folders.
        settings: ``key=value`` arguments.
        output: folder of results; with several targets, the parent of their folders. None: in the run folder, or in the
            working directory.
        step: which weights of the run folders to evaluate; None: the newest.

    Raises:
        ConfigError: there is nothing to evaluate, or two results would go to the same folder.
        DataError: a folder has no weights.
    """
    folders = list(dict.fromkeys(Path(word) for word in words if Path(word).is_dir()))
    files = [word for word in words if not Path(word).is_dir()]
    if not folders:
        if step is not None:
            raise ConfigError(f"--step {step} chooses a checkpoint of a run folder; give one")
        loaded = load(Run, files, settings)
        path = Path(loaded.run.model.path)
        return [Target(loaded, 0, output or Path(RESULTS) / path.name)]
    locations = [find_weights(folder, step) for folder in folders]
    targets = [
        Target(_load(location, files, settings), location.step, _output(location, output, single=len(locations) == 1))
        for location in locations
    ]
    for number, target in enumerate(targets):
        if any(target.output == other.output for other in targets[:number]):
            raise ConfigError(
                f"the results of two folders would go to {target.output}; evaluate each of them with its own --output"
            )
    return targets


def _load(location: WeightsLocation, files: Sequence[str], settings: Sequence[str]) -> Loaded[Run]:
    """Return the settings of the run, overridden by configuration files, overridden by ``settings``."""
    base = location.run / CONFIG if location.run else None
    model_path = f"model.path={json.dumps(str(location.weights.absolute()))}"
    if clash := [word for word in settings if word.partition("=")[0].strip() == "model.path"]:
        raise ConfigError(f"{clash[0]} (command line), but {location.weights} is to be evaluated; leave one out")
    loaded = load(Run, [*([str(base)] if base else []), *files], [*settings, model_path])
    run = loaded.run
    if loaded.origin("rollout.registry") == str(base):  # servers of a Slurm job, which has ended
        run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"registry": ""})})
    return Loaded(run, loaded.origins)


def _output(location: WeightsLocation, output: Path | None, *, single: bool) -> Path:
    name = f"step_{location.step:08}" if location.run else location.weights.absolute().name
    if output is not None:
        return output if single else output / name
    return (location.run or Path()) / RESULTS / name
