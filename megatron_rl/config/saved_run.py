"""Run folders as configurations: ``RUN`` on a command line stands for the settings of that run, to be continued."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import ConfigError

CONFIG = "config.json"
"""Name of the file with the settings of a run."""


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder: its ``config.json`` is a run configuration, not a model's."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return False
    return isinstance(config, dict) and {"model", "task", "train"} <= set(config)


def resuming(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with a run folder replaced by the settings that continue it.

    The settings are those of its ``config.json``; files and ``key=value`` words override them. A folder that was moved
    stays the run folder.

    Raises:
        ConfigError: a folder is no run folder, or there are several.
    """
    folders = [word for word in words if "=" not in word and Path(word).is_dir()]
    if not folders:
        return list(words)
    for folder in folders:
        if not is_run(Path(folder)):
            raise ConfigError(f"{folder} is a folder without the {CONFIG} of a run; give a TOML file or a run folder")
    if len(folders) > 1:
        raise ConfigError(f"{' and '.join(folders)} are run folders; a command continues one of them")
    folder = folders[0]
    others = [word for word in words if word != folder]
    path = json.dumps(str(Path(folder).absolute()))
    return [str(Path(folder) / CONFIG), "train.resume=true", f"log.path={path}", *others]
