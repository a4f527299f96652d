"""The run folder before the first step."""

import json
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.observability.run_folder import prepare_folder
from megatron_rl.report.runs import read_runs
from megatron_rl.train.resume import check_resumable, describe_start


def prepare(folder: Path, *settings: str) -> list[str]:
    return prepare_folder(load(Run, [], ["model.path=x", f"log.path={folder}", *settings]).run, {"torch": "2.9"})


def test_the_folder_is_created_with_settings_and_versions(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert prepare(folder) == []
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 100
    assert json.loads((folder / "versions.json").read_text()) == {"torch": "2.9"}


def test_a_used_folder_is_refused_unless_resumed_and_changes_are_returned(tmp_path):
    prepare(tmp_path)
    prepare(tmp_path)  # nothing was trained yet: a failed start may be repeated
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match=r"train\.resume=true"):
        prepare(tmp_path)
    changes = prepare(tmp_path, "train.resume=true", "train.steps=7", "optimizer.lr=0.5")
    assert changes == ["optimizer.lr: 1e-06 -> 0.5", "train.steps: 100 -> 7"]


def test_settings_and_versions_that_a_resumed_run_changes_are_kept_with_their_step(tmp_path):
    prepare(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 0.5}\n')

    def resume(step: int, version: str, *settings: str) -> None:
        words = ["model.path=x", f"log.path={tmp_path}", "train.resume=true", *settings]
        prepare_folder(load(Run, [], words).run, {"torch": version}, step)

    resume(4, "2.9")
    resume(7, "2.9", "objective.name=gspo", "optimizer.lr=0.5")
    resume(9, "2.10", "objective.name=gspo", "optimizer.lr=0.5")
    first, second = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert (first["step"], first["versions"]) == (7, {})
    assert first["settings"]["optimizer.lr"] == [1e-06, 0.5]
    assert first["settings"]["objective.name"] == ["grpo", "gspo"]
    assert second == {"step": 9, "settings": {}, "versions": {"torch": ["2.9", "2.10"]}}
    notes = "\n".join(read_runs([tmp_path])[0].notes)
    assert "changed at step 7: " in notes
    assert 'objective.name "grpo" -> "gspo"' in notes
    assert "optimizer.lr 1e-06 -> 0.5" in notes


def test_a_folder_that_cannot_be_created_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the run folder .*log\.path"):
        prepare(tmp_path / "file" / "run")


def test_a_run_says_where_it_resumes(tmp_path):
    def said(*settings: str) -> str:
        return check_resumable(load(Run, [], ["model.path=x", f"log.path={tmp_path}", *settings]).run)

    assert said() == ""
    assert said("train.resume=true").endswith(f"no checkpoint in {tmp_path}/checkpoints: starting at step 0")
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    assert describe_start(checkpoint, 5, 6) == f"resuming at step 5 from {checkpoint}"
    for steps in (4, 5):
        assert f"has all {steps} steps" in describe_start(checkpoint, 5, steps)
        assert describe_start(checkpoint, 5, steps).endswith("set train.steps above 5")
