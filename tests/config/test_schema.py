"""The schema: every shipped config loads, every field has a description."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.load import load, to_json
from megatron_rl.config.schema import Parallel, Run
from megatron_rl.config.tree import all_fields

ROOT = Path(__file__).parent.parent.parent
WHOLE = sorted(path for path in (ROOT / "configs").glob("*.toml"))
OVERLAYS = sorted((ROOT / "configs").glob("*/*.toml"))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_config_loads(path):
    assert Path(load(Run, [path]).run.model.path).is_dir()


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_lies_on_the_demo(path):
    run = load(Run, [ROOT / "configs" / "demo.toml", path]).run
    assert run.train.updates_per_step == 4


def test_every_objective_has_an_overlay():
    names = {load(Run, [ROOT / "configs" / "demo.toml", path]).run.objective.name for path in OVERLAYS}
    kinds = {kind for key, _, kind in all_fields(Run) if key[0] == "objective"}
    assert {f'objective.name = "{name}"' for name in names} == kinds


def test_every_field_is_documented():
    silent = [".".join(key) for key, field, _ in all_fields(Run) if key[-1] != "name" and not field.description]
    assert silent == []


def test_keys_are_at_most_two_tables_deep():
    deep = [".".join(key) for key, _, _ in all_fields(Run) if len(key) > 3]
    assert deep == []


def test_defaults_are_valid_json():
    saved = to_json(load(Run, [], ["model.path=x"]).run)
    assert json.loads(saved)["parallel"]["sequence"] is None


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, False, 1, 1, 1, 1)),
        ({"tensor": 2}, (2, True, 2, 1, 2, 1)),
        ({"tensor": 2, "sequence": False}, (2, False, 2, 1, 2, 1)),
        ({"tensor": 2, "expert": 4}, (1, True, 4, 1, 2, 1)),
        ({"tensor": 2, "expert": 2, "expert_tensor": 2, "pipeline": 2}, (2, True, 8, 1, 2, 1)),
        ({"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2}, (2, True, 8, 4, 8, 2)),
    ],
)
def test_sizes_that_follow_from_the_parallel_section(sizes, expected):
    p = Parallel(**sizes)
    multiples = (p.sequence_multiple, p.row_multiple, p.microbatch_multiple)
    assert (p.expert_tensor_size, p.sequence_parallel, p.min_ranks, *multiples) == expected


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(Run, [], ["model.path=~/m", "log.path=~/run"]).run.log.path == f"{tmp_path}/run"
    assert load(Run, [], ["model.path=~/m", "log.path=run"]).run.log.path == "run"
