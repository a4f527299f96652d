"""A run folder as a report reads it: also an old one, one that is still written, one whose run was killed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.observability.file_names import CONFIG, METRICS, MISMATCH, TOKENS

Line = Mapping[str, Any]
"""One JSON object of a file."""


@dataclass(frozen=True)
class RunFolder:
    """What a run left.

    Attributes:
        path: its folder.
        name: short and unlike that of any other run of the report.
        settings: dotted key -> value; empty if there is no ``config.json``.
        lines: of ``metrics.jsonl``, in order of steps.
        mismatch: ``mismatch.json``, if there is one.
        notes: what is missing or broken, in words.
    """

    path: Path
    name: str
    settings: Mapping[str, object]
    lines: Sequence[Line]
    mismatch: Line | None
    notes: Sequence[str]

    @property
    def objective(self) -> str:
        """The name of its objective, or a question mark."""
        return str(self.settings.get("objective.name", "?"))

    @property
    def trained(self) -> list[Line]:
        """The lines of training steps: the last one may be of an evaluation alone."""
        return [line for line in self.lines if "loss" in line]

    def values(self, key: str) -> dict[int, float]:
        """Return step -> number, where it is known; ``a/b`` is the entry b of the metric a, of training steps."""
        head, _, rest = key.partition("/")
        found: dict[int, float] = {}
        for line in self.trained if rest else self.lines:
            value = line.get(head)
            value = value.get(rest) if rest and isinstance(value, Mapping) else value
            if isinstance(value, int | float):
                found[int(line["step"])] = float(value)
        return found


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Return the runs in folders.

    Raises:
        DataError: a folder holds no run, or is named twice.
    """
    if twice := [str(folder) for number, folder in enumerate(folders) if folder in folders[:number]]:
        raise DataError(f"named twice: {', '.join(twice)}; name each run folder once")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> RunFolder:
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} holds no run: it has no {METRICS}; name the log.path of a run")
    notes: list[str] = []
    lines = [line for line in json_lines(folder / METRICS, notes) if isinstance(line.get("step"), int)]
    config = _object(folder / CONFIG, notes)
    if not lines:
        notes.append(f"{METRICS} has no whole line yet")
    if not (folder / TOKENS).is_file():
        notes.append(f"no {TOKENS}: log.tokens was 0, or the run is older than it; so no token is shown")
    mismatch = _object(folder / MISMATCH, notes) or None
    return RunFolder(folder, name, dict(_flat(config)), lines, mismatch, notes)


def json_lines(path: Path, notes: list[str]) -> Iterator[Line]:
    """Yield the objects of a file; a line that is none is left out, and noted."""
    broken: list[int] = []
    last = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for last, text in enumerate(file, start=1):
            try:
                value = json.loads(text, parse_constant=_no_number)
            except json.JSONDecodeError:
                broken.append(last)
                continue
            if isinstance(value, dict):
                yield value
    if broken == [last]:
        notes.append(f"the last line of {path.name} was cut off: the run was killed, or is writing it")
    elif broken:
        notes.append(f"lines of {path.name} that are not JSON, left out: {', '.join(map(str, broken[:5]))}")


def _object(path: Path, notes: list[str]) -> Line:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"), parse_constant=_no_number)
    except FileNotFoundError:
        if path.name == CONFIG:
            notes.append(f"no {CONFIG}: its settings are not known")
        return {}
    except json.JSONDecodeError as error:
        notes.append(f"{path.name} is not JSON: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _no_number(name: str) -> None:
    """Return None for NaN and Infinity, which JSON lacks and browsers refuse."""


def _flat(section: Line, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, and as many before it as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts))
    for count in range(1, deepest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]
