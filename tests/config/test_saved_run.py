"""Run folders on a command line."""

import json

import pytest

from megatron_rl.config.load import load, split_words
from megatron_rl.config.saved_run import is_run, resuming
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError

SETTINGS = {"model": {"path": "/models/a"}, "task": {"name": "chained_arithmetic"}, "train": {"steps": 7}}


@pytest.fixture
def run(tmp_path):
    """A run folder that was moved here."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SETTINGS, "log": {"path": "/elsewhere/run"}}))
    return folder


def test_a_run_folder_stands_for_its_settings_and_is_resumed(run):
    loaded = load(Run, *split_words(resuming([str(run)]))).run
    assert (loaded.train.steps, loaded.train.resume, loaded.model.path) == (7, True, "/models/a")
    assert loaded.log.path == str(run)


def test_files_and_words_override_the_settings_of_a_run_in_any_order(run, tmp_path):
    (tmp_path / "more.toml").write_text("[train]\nsteps = 9\nseed = 3\n")
    for words in (
        ["train.steps=8", str(run), str(tmp_path / "more.toml")],
        [str(tmp_path / "more.toml"), "train.steps=8", str(run), "train.resume=true"],
    ):
        loaded = load(Run, *split_words(resuming(words))).run
        assert (loaded.train.steps, loaded.train.seed, loaded.train.resume) == (8, 3, True)


def test_words_without_a_folder_stay():
    assert resuming(["a.toml", "x=1"]) == ["a.toml", "x=1"]


def test_other_folders_and_two_runs_are_refused(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert not is_run(model)
    with pytest.raises(ConfigError, match=r"is a folder without the config\.json of a run; give a TOML file or a run"):
        resuming([str(model)])
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ConfigError, match="are run folders; a command continues one of them"):
        resuming([str(run), str(other)])
