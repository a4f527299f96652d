"""Parquet files and saved datasets give the same prompts as JSON lines, with labels and conversations."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_rl.config.tasks import EnvironmentConfig, JsonlTask, Reward
from megatron_rl.data.prompts import PromptStream, first_prompts
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.tasks import check_task
from megatron_rl.tasks.jsonl import Jsonl
from tests.tasks.test_jsonl import Bytes

SAVED = Path(__file__).parent / "saved_dataset"
"""Written by tools/make_saved_dataset.py with datasets 5.2.0: train rows 5, 1, 2, 3, 4 and test row 0."""
TOOL = Path(__file__).parents[2] / "tools" / "make_saved_dataset.py"

ROWS = [{"prompt": f"What is {n}?", "answer": str(n), "task": "echo", "difficulty": n % 3} for n in range(40)]


def task(path: Path, **options) -> Jsonl:
    return Jsonl(JsonlTask(path=str(path), **options), Bytes())


def contents(jsonl: Jsonl) -> list[tuple[str, str, dict[str, str]]]:
    return [(p.text, p.answer, dict(p.metadata)) for split in jsonl.splits.values() for p in split]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "all.parquet", row_group_size=7)
    (tmp_path / "data" / "more").mkdir(parents=True)
    for name, part in (("a", table.slice(0, 15)), ("more/a", table.slice(15))):
        parquet.write_table(part, tmp_path / "data" / f"{name}.parquet")
    return tmp_path


def test_parquet_gives_the_prompts_of_json_lines(folder):
    lines = contents(task(folder / "all.jsonl"))
    assert contents(task(folder / "all.parquet", name="parquet")) == lines
    assert contents(task(folder / "data", name="parquet")) == lines
    assert contents(task(folder / "al*.parquet", name="parquet")) == lines
    assert lines[0][2] == {"task": "echo", "difficulty": "0"}
    ids = [p.id for split in task(folder / "data", name="parquet").splits.values() for p in split]
    assert len(set(ids)) == 40
    assert "more/a.parquet:3" in ids


def test_a_folder_that_datasets_saved():
    jsonl = task(
        SAVED / "train",
        name="datasets",
        heldout_path=str(SAVED / "test"),
        prompt_field="question",
        answer_field="solution.value",
    )
    assert [p.answer for p in jsonl.splits["train"]] == ["6", "2", "3", "4", "5"]
    assert [(p.text, dict(p.metadata)) for p in jsonl.splits["heldout"]] == [
        ("What is 0 + 1?", {"task": "sums", "difficulty": "0"})
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets, as tools/peer-env"
)
def test_the_saved_folder_is_what_its_tool_writes():
    checked = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_shuffling_and_resume_depend_only_on_seed_and_position(folder):
    one, other = (task(folder / "data", name="parquet").prompts("train", 3) for _ in range(2))
    whole = PromptStream(one).take(100)
    assert [*PromptStream(one).take(37), *PromptStream(other, 37).take(63)] == list(whole)
    assert [p.answer for p in whole[: one.size]] != sorted((p.answer for p in whole[: one.size]), key=int)
    assert len({p.id for p in whole}) == 100
    assert first_prompts(task(folder / "data", name="parquet").prompts("train", 4), 30) != whole[:30]


def test_conversations_go_through_the_chat_template(folder):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    table = pyarrow.Table.from_pylist([{"prompt": turns, "reward_model": {"ground_truth": "7"}}])
    parquet.write_table(table, folder / "chat.parquet")
    options = {"name": "parquet", "answer_field": "reward_model.ground_truth", "heldout_fraction": 0.0}
    jsonl = task(folder / "chat.parquet", chat_template=True, system_prompt="s", **options)
    assert jsonl.splits["train"][0].text == "<system>s<user>a<assistant>b<user>c<assistant>"
    assert jsonl.splits["train"][0].answer == "7"
    with pytest.raises(DataError, match=r"chat\.parquet:1\); set task\.chat_template = true"):
        task(folder / "chat.parquet", **options)


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("parquet", "none.parquet", "no Parquet file"),
        ("parquet", "all.jsonl", "Parquet magic bytes not found"),
        ("parquet", "b*.parquet", "no Parquet file"),
        ("datasets", "data", "no state.json"),
        ("jsonl", "all.parquet", "not JSON"),
    ],
)
def test_unreadable_files_are_reported_before_any_work(folder, name, path, words):
    (problem,) = check_task(JsonlTask(name=name, path=str(folder / path)), Reward(), EnvironmentConfig())
    assert words in problem


def test_a_dataset_with_several_splits_is_an_error():
    with pytest.raises(DataError, match=r"several splits; write one of .*train, .*test"):
        task(SAVED, name="datasets")


def test_damaged_files_are_an_error_that_names_them(folder):
    whole = (folder / "all.parquet").read_bytes()
    random.seed(0)
    for _ in range(20):
        at = random.randrange(4, len(whole) - 8)
        (folder / "bad.parquet").write_bytes(whole[:at])
        with pytest.raises(DataError, match=r"bad\.parquet"):
            task(folder / "bad.parquet", name="parquet")


def test_a_missing_package_is_a_clear_error(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package pyarrow"):
        task(folder / "all.parquet", name="parquet")
