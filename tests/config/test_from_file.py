"""``objective.name = "path/to/file.py:Class"``: found from the config file's folder, checked like a built-in one."""

import json
import os
from pathlib import Path

import pytest

import megatron_rl
from megatron_rl.algorithms.objectives import OBJECTIVES, Objective
from megatron_rl.config.load import load, settings, to_json
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.prove.main import ObjectiveChoice

FILE = '''
from typing import Annotated
from pydantic import Field
from megatron_rl.algorithms.objectives import GRPO, Objective

class Mine(GRPO):
    """GRPO with names."""

    windows: tuple[float, ...] = (0.1, 0.2)
    """Documented here."""
    length: Annotated[int, Field(ge=1)]
    """Tokens that share a ratio."""

class Other:
    pass

class Unfinished(Objective):
    def columns(self, tokens, vocabulary, segment_ids_R):
        return {}
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "run.toml").write_text(
        '[model]\npath = "m"\n[objective]\nname = "mine.py:Mine"\nlength = 4\nwindows = [0.5, 1]\nclip_low = 0.3\n'
    )
    return tmp_path


def test_a_relative_path_begins_at_the_config_file(folder: Path, monkeypatch):
    monkeypatch.chdir("/")
    objective = load(Run, [folder / "run.toml"]).run.objective
    assert objective.name == f"{folder}/mine.py:Mine"
    assert objective.label == "mine.py:Mine"
    assert objective.model_dump() == {
        "name": f"{folder}/mine.py:Mine",
        "anchor": "old",
        "dual_clip": None,
        "aggregation": "sequence",
        "normalizer": None,
        "clip_low": 0.3,
        "clip_high": 0.2,
        "top_entropy_fraction": None,
        "top_entropy_scope": "response",
        "covariance": {"kind": "none", "fraction": 2e-4, "low": 1.0, "high": 5.0, "coefficient": 1.0, "seed": 0},
        "windows": (0.5, 1.0),
        "length": 4,
    }


def test_on_the_command_line_it_begins_where_the_command_runs(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    choice = load(ObjectiveChoice, [], ["objective.name=mine.py:Mine", "objective.length=2"]).run
    assert choice.objective.name == f"{folder}/mine.py:Mine"


def test_a_saved_configuration_loads_again(folder: Path):
    run = load(Run, [folder / "run.toml"]).run
    (folder / "sub").mkdir()
    saved = folder / "sub" / "config.json"
    saved.write_text(to_json(run))
    assert load(Run, [saved]).run == run
    assert Run.model_validate_json(saved.read_text()) == run
    assert Run.model_validate(run.model_dump(mode="json")) == run
    assert load(Run, [saved], ["objective.length=5"]).run.objective.model_dump()["length"] == 5


def test_a_former_setting_is_named_in_the_error_and_dropped_from_an_older_run_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rollout.rows_per_request.*replaced by rollout.sequences_per_server"):
        load(Run, [], ["model.path=x", "rollout.rows_per_request=8"])
    saved = tmp_path / "config.json"
    saved.write_text('{"model": {"path": "x"}, "rollout": {"rows_per_request": 8, "requests_per_server": 2.0}}')
    assert load(Run, [saved]).run.rollout.sequences_per_server == 512


def test_its_options_are_documented_settings(folder: Path):
    found = {key: (value, meaning) for key, value, meaning in settings(load(Run, [folder / "run.toml"]).run)}
    assert found["objective.windows"] == ((0.5, 1.0), "Documented here.")
    assert found["objective.clip_low"][0] == 0.3


def test_another_name_drops_the_options_of_the_file(folder: Path):
    run = load(Run, [folder / "run.toml"], ["objective.name=gspo"]).run
    assert run.objective == OBJECTIVES["gspo"]()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.lengths=3", "unknown key objective.lengths: 3 (command line: objective.lengths=3); did you mean"),
        ("objective.length=0", "wrong value for objective.length: 0 (command line: objective.length=0); it should be"),
        ('objective.length="4"', 'objective.length: "4" (command line: objective.length="4"); write 4 without quotes'),
        (
            "objective.name=no.py:Mine",
            "no such file: {cwd}/no.py (command line: objective.name=no.py:Mine); write path",
        ),
        (
            "objective.name={folder}/mine.py:Min",
            "no function or class Min in {folder}/mine.py (command line: objective",
        ),
        ("objective.name={folder}/mine.py:Min", "; it has Mine, Other, Unfinished"),
        (
            "objective.name={folder}/mine.py",
            "no name after the file {folder}/mine.py (command line: objective.name={folder}/mine.py); "
            "write {folder}/mine.py:NAME, where NAME is one of Mine, Other, Unfinished",
        ),
        ("objective.name=no.py", "no such file: {cwd}/no.py (command line: objective.name=no.py); write path"),
        ("objective.name={folder}/mine.py:Other", "Other in {folder}/mine.py is not a subclass of Objective (command"),
        (
            "objective.name={folder}/mine.py:Unfinished",
            "Unfinished in {folder}/mine.py does not define cost (command",
        ),
        (
            "objective.name=grpoo",
            'no such objective.name: "grpoo" (command line: objective.name=grpoo); did you mean "gr',
        ),
        ("objective.name=minepy", '", "path/to/file.py:Class")'),
    ],
)
def test_errors_say_what_is_wrong_where_it_was_set_and_what_to_write(folder: Path, override: str, message: str):
    with pytest.raises(ConfigError) as error:
        load(Run, [folder / "run.toml"], [override.format(folder=folder)])
    assert message.format(folder=folder, cwd=os.getcwd()) in str(error.value)


def test_a_missing_option_and_a_file_that_fails_are_explained(folder: Path):
    (folder / "run.toml").write_text('[model]\npath = "m"\n[objective]\nname = "mine.py:Mine"\n')
    with pytest.raises(
        ConfigError, match=r"objective\.length is not set; write length = \.\.\. under \[objective\]: Tok"
    ):
        load(Run, [folder / "run.toml"])
    (folder / "mine.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"mine\.py cannot be imported: ModuleNotFoundError: No .*run\.toml:4\)"):
        load(Run, [folder / "run.toml"])


def test_a_changed_file_is_read_again(folder: Path):
    first = load(Run, [folder / "run.toml"]).run.objective
    (folder / "mine.py").write_text(FILE.replace("GRPO with names", "changed"))
    os.utime(folder / "mine.py", ns=(1, 1))
    second = load(Run, [folder / "run.toml"]).run.objective
    assert (type(first).__mro__[1].__doc__, type(second).__mro__[1].__doc__) == ("GRPO with names.", "changed.")


def test_policy_loss_takes_a_file_and_explains_its_options(folder: Path, monkeypatch):
    import torch

    monkeypatch.chdir(folder)
    ones = torch.ones(2, 3)
    arguments = {
        "logprobs": -ones,
        "old_logprobs": -ones,
        "advantages": torch.tensor([1.0, -1.0]),
        "loss_mask": ones > 0,
    }
    options = {"name": "mine.py:Mine", "length": 3}
    assert float(megatron_rl.policy_loss(options, **arguments).loss) == 0
    with pytest.raises(
        ConfigError, match=r"unknown key objective\.lenght: 3 \(in .*\); did you mean objective\.length"
    ):
        megatron_rl.policy_loss({"name": "mine.py:Mine", "lenght": 3, "length": 3}, **arguments)


def test_every_registered_objective_has_an_overlay():
    overlays = Path(__file__).resolve().parents[2] / "configs" / "objective"
    demo = overlays.parent / "demo.toml"
    named = {load(Run, [demo, file]).run.objective.name for file in overlays.glob("*.toml")}
    assert named == set(OBJECTIVES)
    assert all(issubclass(section, Objective) for section in OBJECTIVES.values())


def test_json_of_a_run_names_the_file(folder: Path):
    assert json.loads(to_json(load(Run, [folder / "run.toml"]).run))["objective"]["name"] == f"{folder}/mine.py:Mine"
