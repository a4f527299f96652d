"""Damaged data files give rows or one DataError that names the file, never another exception."""

import json
import random
from pathlib import Path
from typing import Literal

import pytest

from megatron_rl.config.tasks import JsonlTask
from megatron_rl.errors import DataError
from megatron_rl.tasks.jsonl import check_files, read_prompt_rows

SEED = 20261129
PARQUET_FILES, JSON_LINES = 1500, 4000


def read(name: Literal["jsonl", "parquet"], path: Path) -> str | None:
    """Return the message of the error, None without one."""
    try:
        list(read_prompt_rows(JsonlTask(name=name, path=str(path), chat_template=name == "jsonl"), path))
    except DataError as error:
        return str(error)
    return None


def damaged(raw: bytes, generator: random.Random) -> bytes:
    """Return bytes with a few of them changed, removed, repeated or zeroed."""
    at, length = generator.randrange(len(raw)), generator.choice((1, 1, 2, 8, 64))
    match generator.randrange(5):
        case 0:
            return raw[:at] + bytes(generator.randrange(256) for _ in range(length)) + raw[at + length :]
        case 1:
            return raw[:at]
        case 2:
            return raw[:at] + raw[at + length :]
        case 3:
            return raw[: at + length] + raw[at:]
        case _:
            return raw[:at] + bytes(length) + raw[at + length :]


def test_damaged_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"prompt": [f"{n} + {n} =" for n in range(200)], "answer": list(map(str, range(200)))}
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.table(columns), whole, compression="snappy", row_group_size=64)
    assert read("parquet", whole) is None
    raw, generator, refused = whole.read_bytes(), random.Random(SEED), 0
    for _ in range(PARQUET_FILES):
        file = tmp_path / "a.parquet"
        file.write_bytes(damaged(raw, generator))
        if (problem := read("parquet", file)) is not None:
            refused += 1
            assert str(file) in problem
    assert refused > PARQUET_FILES // 3


def test_damaged_lines(tmp_path):
    line = json.dumps({"prompt": [{"role": "user", "content": "2 \u00e9 \\ud83d\\ude00?"}], "answer": 4.5, "task": "t"})
    generator, refused = random.Random(SEED), 0
    for _ in range(JSON_LINES):
        file = tmp_path / "a.jsonl"
        file.write_bytes(damaged(line.encode(), generator) + b"\n")
        if (problem := read("jsonl", file)) is not None:
            refused += 1
            assert f"{file}:" in problem
    assert refused > JSON_LINES // 3


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": 3}', '{"_data_files": [3]}', '{"_data_files": [{}]}'])
def test_a_damaged_folder_of_a_dataset(tmp_path, state):
    pytest.importorskip("pyarrow")
    (tmp_path / "state.json").write_text(state)
    (problem,) = check_files(JsonlTask(name="datasets", path=str(tmp_path)))
    assert "damaged" in problem
    assert "state.json" in problem
