"""Reads settings from TOML files and ``key=value`` words, and records where each was written."""

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.shipped import shipped_configs
from megatron_rl.errors import ConfigError

Key = tuple[str, ...]
"""The path of a setting in the tree: ``("train", "steps")`` is written ``train.steps``."""


@dataclass(frozen=True)
class ConfigSource:
    """The settings of one file, or of all ``key=value`` words.

    Attributes:
        table: the settings, as nested tables.
        origins: where each table and setting was written, such as ``configs/demo.toml:12``.
        folder: base of relative paths.
        is_saved: whether it is the ``config.json`` of a run folder, maybe of an earlier release.
    """

    table: Mapping[str, object]
    origins: Mapping[Key, str]
    folder: Path
    is_saved: bool = False

    def origin(self, key: Key) -> str | None:
        """Return where a setting was written, or None; a setting in an inline table has the origin of the table."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return None


def read_sources(files: Sequence[str | Path], overrides: Sequence[str]) -> list[ConfigSource]:
    """Read all sources, weakest first.

    Raises:
        ConfigError: a source cannot be read; the message lists all problems.
    """
    problems: list[str] = []
    sources: list[ConfigSource] = []
    for file in files:
        if list(map(str, files)).count(str(file)) > 1:
            problems.append(f"config file given twice: {file}; give it once")
            continue
        try:
            sources.append(read_file(Path(file)))
        except ConfigError as error:
            problems.append(str(error))
    try:
        sources.append(read_overrides(overrides))
    except ConfigError as error:
        problems.append(str(error))
    raise_problems(dict.fromkeys(problems))
    return sources


def is_file(path: str | Path) -> bool:
    """Return whether a path is an existing file; a text that cannot be a path is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def raise_problems(problems: Sequence[str] | Mapping[str, None]) -> None:
    """Raise a ConfigError that lists the problems, unless there are none."""
    lines = list(problems)
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError("\n".join([f"{len(lines)} problems:", *(f"  - {line}" for line in lines)]))


def read_file(path: Path) -> ConfigSource:
    """Read a TOML file, or the ``config.json`` of a run folder."""
    if not is_file(path):
        raise ConfigError(_missing_file(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"not UTF-8: {error.reason} ({path}:{line}); save the file with this encoding") from error
    if path.suffix == ".json":
        return _read_json(path, text)
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"arrays or tables are nested too deeply ({path}); no setting needs this") from error
    except ValueError as error:
        place = re.search(r"\(at line (\d+), column \d+\)", str(error))
        where = f"{path}:{place[1]}" if place else str(path)
        reason = str(error).partition(" (at ")[0]
        raise ConfigError(f"not valid TOML: {reason} ({where}); strings need quotes, a key may be set once") from error
    return ConfigSource(table, {key: f"{path}:{line}" for key, line in key_lines(text).items()}, path.resolve().parent)


def _read_json(path: Path, text: str) -> ConfigSource:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON: {error} ({path}); give the config.json of a run, or a TOML file") from error
    if not isinstance(table, dict):
        raise ConfigError(f"not a JSON object: {path}; give the config.json of a run, or a TOML file")
    return ConfigSource(table, {(name,): str(path) for name in table}, path.resolve().parent, is_saved=True)


def _missing_file(path: Path) -> str:
    """Return the message about a word that is neither a file nor a setting."""
    if hint := _shipped_name(path):
        return f"no config file {path}; `megatron-rl init {hint}` copies the shipped one to configs"
    folder = path.parent if path.parent.is_dir() and path.parent != Path() else Path("configs")
    names = sorted(str(found) for pattern in ("*.toml", "*/*.toml") for found in folder.glob(pattern))
    close = difflib.get_close_matches(str(path), names, 1)
    if close:
        return f"no config file {path}; did you mean {close[0]}?"
    if path.suffix not in (".toml", ".json"):
        return f"{path} is no file, folder or setting; write a file ending in .toml, or section.key=value"
    there = f"there are {', '.join(names)}" if names else f"there is no TOML file in {folder}"
    return f"no config file {path}; {there}"


def _shipped_name(path: Path) -> str | None:
    """Return the name of the shipped config that a missing file may mean, if there is none in the working directory."""
    names = [str(Path(*path.parts[start:]).with_suffix("")) for start in range(len(path.parts))]
    shipped = shipped_configs()
    return next((name for name in names if name in shipped and not Path("configs", f"{name}.toml").exists()), None)


_HEADER = re.compile(r"^\s*\[([^\[\]]+)\]\s*(?:#.*)?$")
_SETTING = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def key_lines(text: str) -> dict[Key, int]:
    """Return the line number, from 1, of every table and setting of a TOML text."""
    lines: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _split(header[1])
            lines.setdefault(table, number)
        elif setting := _SETTING.match(line):
            lines.setdefault(table + _split(setting[1]), number)
    return lines


def _split(dotted: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def read_overrides(words: Sequence[str]) -> ConfigSource:
    """Read ``key=value`` words, the last of which wins; a value that is not TOML is a string."""
    table: dict[str, object] = {}
    origins: dict[Key, str] = {}
    problems: list[str] = []
    for word in words:
        name, equals, text = word.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            problems.append(
                f"not an override: {word!r} (command line); write section.key=value, or a file ending in .toml"
            )
        else:
            if key in origins:
                _remove(table, key)
            origins[key] = f"command line: {word}"
            try:
                _put(table, key, parse_value(text))
            except ConfigError as error:
                problems.append(f"{error} (command line: {word})")
    raise_problems(problems)
    return ConfigSource(table, origins, Path.cwd())


def _remove(table: dict[str, object], key: Key) -> None:
    """Remove the value of an earlier word with the same key."""
    inner: object = table
    for part in key[:-1]:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop(key[-1], None)


def _put(table: dict[str, object], key: Key, value: object) -> None:
    for part in key[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part} is both a value and a table; set one of them")
        table = inner
    if isinstance(table.get(key[-1]), dict):
        raise ConfigError(f"{'.'.join(key)} is both a value and a table; set one of them")
    table[key[-1]] = value


def parse_value(text: str) -> object:
    """Return the value of a TOML expression, or the text itself if it is not one."""
    text = text.strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except RecursionError as error:
        raise ConfigError(f"nested too deeply: {text[:40]}...; no setting needs this") from error
    except ValueError as error:
        if not isinstance(error, tomllib.TOMLDecodeError):  # Python converts numbers of at most 4300 digits
            raise ConfigError(
                f"not a number that can be read: {text[:40]}...: it has {len(text)} characters"
            ) from error
        if text[:1] in {'"', "'", "[", "{"}:
            reason = str(error).partition(" (at ")[0]
            raise ConfigError(f"not a TOML value: {text}: {reason}; close the quote or bracket") from error
        return text
    is_date = isinstance(value, datetime.date | datetime.time)
    return text if is_date else value
