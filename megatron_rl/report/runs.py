"""Run folders as a report reads them: of finished, running and killed runs and of older versions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.observability.file_names import CONFIG, HISTORY, METRICS, MISMATCH, TOKENS, WARNINGS

Line = Mapping[str, Any]
"""A JSON object, one line of a file."""


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
        path: the folder.
        name: short name, unique in the report.
        settings: dotted key -> value; empty if there is no ``config.json``.
        lines: lines of ``metrics.jsonl``, in the order of steps.
        mismatch: content of ``mismatch.json``; None without one.
        notes: warnings of the run, and missing or damaged files, as text.
    """

    path: Path
    name: str
    settings: Mapping[str, object]
    lines: Sequence[Line]
    mismatch: Line | None
    notes: Sequence[str]

    @property
    def objective(self) -> str:
        """The name of its objective, without the folder of a file, or a question mark."""
        return str(self.settings.get("objective.name", "?")).rpartition("/")[2]

    @property
    def trained(self) -> list[Line]:
        """The lines of training steps; the last line may be of an evaluation only."""
        return [line for line in self.lines if "loss" in line]

    def values(self, key: str) -> dict[int, float]:
        """Return step -> value of a metric. ``a/b`` is that metric, or entry b of a, of training steps only."""
        head, _, rest = key.partition("/")
        values: dict[int, float] = {}
        for line in self.trained if rest else self.lines:
            value = line.get(key, line.get(head))
            value = value.get(rest) if rest and isinstance(value, Mapping) else value
            if isinstance(value, int | float):
                values[int(line["step"])] = float(value)
        return values


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Read run folders.

    Raises:
        DataError: a folder is not a run folder, or is given twice.
    """
    if repeated := [str(folder) for number, folder in enumerate(folders) if folder in folders[:number]]:
        raise DataError(f"given twice: {', '.join(repeated)}; give each run folder once")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> RunFolder:
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} is not a run folder: it has no {METRICS}; give the log.path of a run")
    notes: list[str] = []
    lines = [line for line in json_lines(folder / METRICS, notes) if isinstance(line.get("step"), int)]
    config = _read_object(folder / CONFIG, notes)
    if not lines:
        notes.append(f"{METRICS} has no complete line yet")
    if not (folder / TOKENS).is_file():
        notes.append(f"no {TOKENS}: log.tokens was 0, or an older version wrote the run; tokens are not shown")
    if (folder / HISTORY).is_file():
        notes += [note for line in json_lines(folder / HISTORY, notes) for note in _describe_changes(line)]
    if (folder / WARNINGS).is_file():
        notes += [f"step {line.get('step')}: {line.get('warning')}" for line in json_lines(folder / WARNINGS, notes)]
    mismatch = _read_object(folder / MISMATCH, notes) or None
    return RunFolder(folder, name, dict(_flatten(config)), lines, mismatch, notes)


def _describe_changes(line: Line) -> Iterator[str]:
    """Yield a note if a resumed run changed settings or versions; the page shows those of the last part of the run."""
    changes = [*dict(line.get("settings", {})).items(), *dict(line.get("versions", {})).items()]
    if changes:
        listed = ", ".join(f"{key} {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changes)
        yield f"changed at step {line.get('step')}: {listed}; earlier steps have the old values"


def json_lines(path: Path, notes: list[str]) -> Iterator[Line]:
    """Yield the JSON objects of a file. Other lines are left out, and a note is added."""
    broken: list[int] = []
    last = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for last, text in enumerate(file, start=1):
            try:
                value = json.loads(text, parse_constant=_null)
            except json.JSONDecodeError:
                broken.append(last)
                continue
            if isinstance(value, dict):
                yield value
    if broken == [last]:
        notes.append(f"the last line of {path.name} is incomplete: the run was killed, or is writing it")
    elif broken:
        notes.append(f"lines of {path.name} that are not JSON, left out: {', '.join(map(str, broken[:5]))}")


def _read_object(path: Path, notes: list[str]) -> Line:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"), parse_constant=_null)
    except FileNotFoundError:
        if path.name == CONFIG:
            notes.append(f"no {CONFIG}: the settings are unknown")
        return {}
    except json.JSONDecodeError as error:
        notes.append(f"{path.name} is not JSON: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _null(name: str) -> None:
    """Return None for NaN and Infinity, which are not JSON and which browsers reject."""


def _flatten(section: Line, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as many as are needed to distinguish the paths."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts))
    for count in range(1, deepest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]
