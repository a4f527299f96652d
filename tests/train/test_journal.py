"""The run folder and what is written into it."""

import json
import time
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import ConfigError
from megatron_rl.observability.console import COLUMNS, Board, cells_of, duration
from megatron_rl.observability.recorder import RunRecorder, farewell, read_metrics
from megatron_rl.observability.run_folder import prepare_folder
from megatron_rl.tasks.base import Verdict

ONE = {"weight_version": 0, "reward_mean": 0.25, "loss": -0.1, "tokens": 900}


def run_in(folder: Path, *settings: str) -> Run:
    return load(Run, [], ["model.path=x", f"log.path={folder}", *settings]).run


def sample(index: int) -> Response:
    return Response(f"0-p-{index}", "p", index, (1, 2), (-0.5, -0.1), "#4", "stop", ((0, 0, 2),))


def test_a_step_is_one_line_of_documented_keys_with_its_phases(tmp_path):
    with RunRecorder(tmp_path, 3) as journal:
        with journal.phase("rollout"):
            pass
        with journal.phase("rollout"):
            pass
        journal.write(0, ONE)
        journal.write(1, {**ONE, "loss": float("nan"), "accuracy": 0.5})
    first, second = read_metrics(tmp_path)
    assert first | {"seconds": None} == {"step": 0, **ONE, "seconds": None}
    assert first["seconds"].keys() == {"rollout", "total"}
    assert second["seconds"].keys() == {"total"}
    assert second["loss"] is None


def test_a_metric_without_documentation_is_refused(tmp_path):
    with RunRecorder(tmp_path, 3) as journal, pytest.raises(AssertionError, match="surprise"):
        journal.write(0, {"surprise": 1.0})


def test_floats_keep_every_bit(tmp_path):
    with RunRecorder(tmp_path, 1) as journal:
        journal.write(0, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path)[0]["loss"] == 0.1 + 0.2


def test_samples_are_written_with_reward_and_versions(tmp_path):
    groups = [Group(Prompt("p", (1,), "2+2=", "4"), (sample(0), sample(1)))]
    with RunRecorder(tmp_path, 1) as journal:
        journal.rollouts(5, groups, [[Verdict(1.0, True), Verdict(None, False, "not verified")]])
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [1.0, None]
    assert lines[0]["response"] == "#4"
    assert lines[0]["weight_versions"] == [[0, 0, 2]]
    assert lines[1]["reason"] == "not verified"


def test_a_resumed_run_repeats_no_line_and_drops_a_torn_one(tmp_path):
    groups = [Group(Prompt("p", (1,), "2+2=", "4"), (sample(0),))]
    with RunRecorder(tmp_path, 5) as journal:
        for step in range(4):
            journal.rollouts(step, groups, [[Verdict(1.0, True)]])
            journal.write(step, ONE)
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 1, "lo')
    with RunRecorder(tmp_path, 5, step=2) as journal:
        journal.rollouts(2, groups, [[Verdict(0.0, False)]])
        journal.write(2, ONE)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_other_ranks_time_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunRecorder(None, 3) as journal:
        with journal.phase("train"):
            pass
        journal.rollouts(0, [], [])
        journal.say("x")
        journal.write(0, ONE)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_step_is_a_plain_line(tmp_path, capsys):
    with RunRecorder(tmp_path, 3) as journal:
        journal.say("hello [red]")
        journal.write(0, ONE)
        journal.write(1, ONE)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "hello [red]"
    assert told[1].split()[:3] == ["step", "reward", "accuracy"]
    assert told[2].split()[:3] == ["0/3", "0.250", "-"]
    log = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == told


def test_on_a_terminal_there_is_a_live_table(tmp_path, capsys):
    with RunRecorder(tmp_path, 3, terminal=True) as journal:
        with journal.phase("rollout"):
            pass
        journal.write(0, ONE)
    told = capsys.readouterr().out
    assert "\x1b[" in told
    assert "0.250" in told
    assert "0/3" in (tmp_path / "console.log").read_text()


def test_rows_have_a_dash_for_what_is_not_known():
    cells = cells_of(4, 30, {"tokens": 1000}, {"rollout": 1.0, "train": 3.0, "total": 4.0}, 65.0)
    assert len(cells) == len(COLUMNS)
    assert cells[0] == "4/30"
    assert cells[1] == "-"
    assert cells[-3:] == ("250", "rollout 1.0, train 3.0 = 4.0", "1:05")
    assert duration(3723) == "1:02:03"


def test_the_folder_is_made_with_settings_and_versions(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert prepare_folder(run_in(folder)) == []
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 100
    assert json.loads((folder / "versions.json").read_text())["megatron-core"]


def test_a_used_folder_is_refused_unless_resumed_and_changes_are_told(tmp_path):
    prepare_folder(run_in(tmp_path))
    prepare_folder(run_in(tmp_path))  # nothing was trained yet: a failed start may be repeated
    (Path(run_in(tmp_path).log.path) / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match=r"train\.resume=true"):
        prepare_folder(run_in(tmp_path))
    changes = prepare_folder(run_in(tmp_path, "train.resume=true", "train.steps=7", "optimizer.lr=0.5"))
    assert changes == ["optimizer.lr: 1e-06 -> 0.5", "train.steps: 100 -> 7"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the run folder .*log\.path"):
        prepare_folder(run_in(tmp_path / "file" / "run"))


def test_time_left_follows_the_latest_steps(tmp_path, capsys):
    board = Board(10)
    board.row(0, {}, {"total": 4.0})
    board.row(1, {}, {"total": 2.0})
    assert [row[-1] for row in board.rows] == ["0:36", "0:24"]


def test_the_time_before_the_first_phase_belongs_to_no_step(tmp_path):
    with RunRecorder(tmp_path, 1) as journal:
        time.sleep(0.2)
        with journal.phase("rollout"):
            pass
        journal.write(0, ONE)
    assert read_metrics(tmp_path)[0]["seconds"]["total"] < 0.1


def test_a_run_ends_with_how_it_went_and_where_it_is(tmp_path):
    with RunRecorder(tmp_path, 3) as journal:
        for step, accuracy in enumerate([0.25, 0.5, 0.875]):
            journal.write(step, {"accuracy": accuracy})
    told = farewell(tmp_path, resumable=True)
    assert told[0] == "accuracy on held-out prompts: 0.250 at first, 0.875 at last"
    assert told[1] == f"run folder: {tmp_path}"
    assert [line.split()[0] for line in told[2:-1]] == ["metrics.jsonl", "rollouts.jsonl", "console.log"]
    assert "train.resume=true" in told[-1]


def test_a_run_that_was_never_evaluated_ends_too(tmp_path):
    RunRecorder(tmp_path, 3).close()
    assert farewell(tmp_path, resumable=False)[0] == f"run folder: {tmp_path}"
