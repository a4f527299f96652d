"""Rows of local files: JSONL, Parquet, and folders that Hugging Face ``datasets`` saved. Nothing is downloaded."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_rl.errors import ConfigError, DataError

FileFormat = Literal["jsonl", "parquet", "datasets"]

DAMAGE = (OSError, ValueError, ArithmeticError, MemoryError, TypeError, LookupError)
"""What conversions of damaged data raise, in addition to the exceptions of pyarrow."""


@dataclass(frozen=True)
class RowLocation:
    """File and number of a row."""

    file: Path
    number: int
    """Number of the line or row, from 1."""
    name: str
    """Path of the file relative to the folder that the setting names, or its name."""

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def read_rows(kind: FileFormat, path: Path) -> Iterator[tuple[RowLocation, Mapping[str, object]]]:
    """Yield the rows of a file or folder.

    Raises:
        DataError: a file is missing, or a row cannot be read; the message names its file and line.
        ConfigError: the package pyarrow is needed and not installed.
    """
    if kind == "jsonl":
        return _jsonl(path)
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"task.name = {kind!r} needs the package pyarrow, which is not installed; pip install 'megatron-rl[tasks]'"
        )
    return _parquet(path) if kind == "parquet" else _saved_dataset(path)


def _jsonl(path: Path) -> Iterator[tuple[RowLocation, Mapping[str, object]]]:
    if not path.is_file():
        raise DataError(f"no such file: {path} (task.path or task.heldout_path); write the path of a JSONL file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                location = RowLocation(path, number, path.name)
                yield location, _parse_object(raw, location)


def _parse_object(raw: bytes, location: RowLocation) -> Mapping[str, object]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:  # the second: deeply nested
        raise DataError(f"not JSON: {_truncate(raw)} ({location}): {error}; write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"not a JSON object: {_truncate(raw)} ({location}); write {{...}} with a prompt and an answer")
    return row


def _truncate(raw: bytes) -> str:
    text = raw.decode(errors="replace").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parquet(path: Path) -> Iterator[tuple[RowLocation, Mapping[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    files = [file for found in files for file in (sorted(found.rglob("*.parquet")) if found.is_dir() else [found])]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"no Parquet file: {path} (task.path or task.heldout_path); write a file, a folder, or a pattern such as"
            " data/train-*.parquet"
        )
    for file in files:
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RowLocation(file, number, _relative_name(file, path)), row
        except (pyarrow.ArrowException, *DAMAGE) as error:
            row = f", after row {number}" if number else ""
            raise DataError(f"cannot read {file}{row} (task.path or task.heldout_path): {error}") from error


def _relative_name(file: Path, path: Path) -> str:
    return str(file.relative_to(path)) if file.is_relative_to(path) and file != path else file.name


def _saved_dataset(path: Path) -> Iterator[tuple[RowLocation, Mapping[str, object]]]:
    """Yield the rows of a folder that ``Dataset.save_to_disk`` wrote."""
    import pyarrow

    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = ", ".join(str(path / str(name)) for name in _json_list(splits, "splits"))
        raise DataError(f"{path} (task.path or task.heldout_path) has several splits; write one of {names}")
    state = path / "state.json"
    if not state.is_file():
        raise DataError(
            f"no dataset in {path} (task.path or task.heldout_path): no state.json; write a folder that"
            ' Dataset.save_to_disk wrote, or set task.name = "parquet" for Parquet files'
        )
    for entry in _json_list(state, "_data_files"):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("filename"), str):
            raise DataError(f"{state} (task.path or task.heldout_path) is damaged: _data_files has {entry!r}")
        file, number = path / entry["filename"], 0
        try:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
                for batch in batches:
                    for row in batch.to_pylist():
                        number += 1
                        yield RowLocation(file, number, file.name), row
        except (pyarrow.ArrowException, *DAMAGE) as error:
            raise DataError(f"cannot read {file} (task.path or task.heldout_path): {error}") from error


def _json_list(path: Path, key: str) -> list[object]:
    """Return a list from an object in a JSON file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path} (task.path or task.heldout_path) is damaged: {error!r}") from error
    if not isinstance(value, list):
        raise DataError(f"{path} (task.path or task.heldout_path) is damaged: {key} is no list")
    return value
