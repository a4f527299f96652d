"""The configs that come with the package: in the wheel ``megatron_rl/configs``, in a clone ``configs``."""

import difflib
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_rl.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """Return the folder of the shipped configs."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name, such as ``demo`` and ``objective/gspo``."""
    folder = configs_folder()
    files = [*sorted(folder.glob("*.toml")), *sorted(folder.glob("*/*.toml"))]
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}


def summary(file: Path) -> str:
    """Return the first sentence of the comment that begins a config."""
    lines = file.read_text(encoding="utf-8").splitlines()
    count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    return re.split(r"\.(?= [A-Z]|$)|: +megatron-rl ", comment)[0]


def copy_configs(names: Sequence[str], folder: Path) -> list[Path]:
    """Copy configs, and the files that they name, to a folder with the same structure; return the new paths.

    Raises:
        ConfigError: a name is unknown, or a file exists with other content; nothing is copied then.
    """
    configs = shipped_configs()
    if unknown := [name for name in names if name not in configs]:
        close = difflib.get_close_matches(unknown[0], [*configs, *(Path(name).name for name in configs)], 1)
        hint = [name for name in configs if close and name.endswith(close[0])][:1]
        meant = f"did you mean {hint[0]}?" if hint else "`megatron-rl configs` lists them"
        raise ConfigError(f"no shipped config {unknown[0]!r}; {meant}")
    sources = dict.fromkeys(path for name in names for path in _with_references(configs[name]))
    targets = {path: folder / path.relative_to(configs_folder()) for path in sources}
    for source, target in targets.items():
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise ConfigError(f"{target} exists and differs from the shipped one; remove it, or give another --folder")
    try:
        for source, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; give another folder: --folder") from error
    return [targets[configs[name]] for name in names]


def _with_references(file: Path) -> Iterator[Path]:
    """Yield a config and the shipped files that its values name: models, and Python files."""
    yield file
    for value in _strings(tomllib.loads(file.read_text(encoding="utf-8"))):
        path = (file.parent / value.partition(".py:")[0]).resolve()
        if ".py:" in value:
            path = path.with_suffix(".py")
        if value and path.is_relative_to(configs_folder()) and path != configs_folder():
            yield from [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
