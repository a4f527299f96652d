"""Weights of run folders by step."""

import json

import pytest

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.run_weights import find_training_checkpoint, find_weights


@pytest.fixture
def run(tmp_path):
    """A run of 6 steps with checkpoints of steps 2 and 4 and exports of steps 4 and 6."""
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "task": {}, "train": {"steps": 6}}))
    for name in (
        "checkpoints/step_00000002",
        "checkpoints/step_00000004",
        "exports/step_00000004",
        "exports/step_00000006",
    ):
        (tmp_path / name).mkdir(parents=True)
    for meta in ("checkpoints/step_00000002/meta.json", "checkpoints/step_00000004/meta.json"):
        (tmp_path / meta).touch()
    return tmp_path


def test_weights_of_a_step_are_found_and_exports_preferred(run):
    assert find_weights(run).weights == run / "exports" / "step_00000006"
    assert find_weights(run, 4).weights == run / "exports" / "step_00000004"
    assert find_weights(run, 2).weights == run / "checkpoints" / "step_00000002"
    with pytest.raises(DataError, match=r"no checkpoint and no export of step 3; there are steps 2, 4, 6"):
        find_weights(run, 3)


def test_the_final_export_counts_for_the_last_step_unless_the_run_goes_on(run):
    (run / "export").mkdir()
    assert find_weights(run, 6).weights == run / "export"
    (run / "config.json").write_text(json.dumps({"model": {}, "task": {}, "train": {"steps": 9}}))
    assert find_weights(run).step == 6
    with pytest.raises(DataError, match="of step 9"):
        find_weights(run, 9)


def test_training_checkpoints_are_found_by_step(run):
    assert find_training_checkpoint(run) == run / "checkpoints" / "step_00000004"
    assert find_training_checkpoint(run, 2) == run / "checkpoints" / "step_00000002"
    assert find_training_checkpoint(run / "checkpoints" / "step_00000002") == run / "checkpoints" / "step_00000002"
    with pytest.raises(DataError, match=r"step 6 are in Hugging Face format already: .*exports/step_00000006"):
        find_training_checkpoint(run, 6)
    with pytest.raises(DataError, match=r"no training checkpoint of step 3; there are steps 2, 4"):
        find_training_checkpoint(run, 3)


def test_a_step_needs_a_run_folder(run):
    for find in (find_weights, find_training_checkpoint):
        with pytest.raises(ConfigError, match="--step 2 chooses a checkpoint of a run folder"):
            find(run / "checkpoints" / "step_00000002", 2)


def test_a_run_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "task": {}, "train": {"steps": 6}}))
    for find in (find_weights, find_training_checkpoint):
        with pytest.raises(DataError, match="has no weights yet"):
            find(tmp_path)
