"""The files and the console of a run."""

import json
import logging
import time

import numpy as np
import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.step import RecordedSample, StepReport, StepSamples
from megatron_rl.data.types import Batch, Group, Metrics, Prompt, Response
from megatron_rl.observability.recorder import RunRecorder, read_metrics, run_summary
from megatron_rl.observability.step_metrics import StepMetrics
from megatron_rl.rollout.collect import collect
from megatron_rl.tasks.base import Verdict

ONE = {"weight_version": 0, "reward_mean": 0.25, "loss": -0.1, "tokens": 900}
LOG = logging.getLogger("megatron_rl.somewhere")


def rollout(step: int) -> tuple[Batch, StepSamples]:
    """Return the batch of a step with one response, and its samples."""
    response = Response("0-p-0", "p", 0, np.array((1, 2)), np.array((-0.5, -0.1)), "#4", "stop", ((0, 0, 2),))
    group = Group(Prompt("p", (1,), "2+2=", "4"), (response,))
    batch = collect([group], [[Verdict(1.0, True)]], load(Run, [], ["model.path=x"]).run)
    lines, ledger = (json.dumps({"step": step, **entry}) + "\n" for entry in ({"id": "0-p-0"}, {"group": "0-p"}))
    sample = RecordedSample(response.id, "p", "2+2=", "#4", (1, 2))
    return batch.outline(), StepSamples([2], lambda indices: [sample for _ in indices], lines, ledger, {"refills": 3})


def test_a_step_is_one_line_of_documented_keys_with_its_phases(tmp_path):
    with RunRecorder(tmp_path, 3) as recorder:
        with recorder.phase("rollout"):
            pass
        with recorder.phase("rollout"):
            pass
        recorder.write(0, ONE)
        recorder.write(1, {**ONE, "loss": float("nan"), "accuracy": 0.5})
    first, second = read_metrics(tmp_path)
    assert first | {"seconds": None} == {"step": 0, **ONE, "seconds": None}
    assert first["seconds"].keys() == {"rollout", "total"}
    assert second["seconds"].keys() == {"total"}
    assert second["loss"] is None


def test_a_metric_without_documentation_is_refused(tmp_path):
    with RunRecorder(tmp_path, 3) as recorder, pytest.raises(AssertionError, match="surprise"):
        recorder.write(0, {"surprise": 1.0})


def test_measures_of_an_objective_are_means_over_the_updates_of_a_step(tmp_path):
    def update(multiplier: float, tokens: float) -> Metrics:
        sums = dict.fromkeys(("loss", "responses", "segments", "clipped", "entropy", "policy_kl", "ratio"), 1.0)
        sums |= {"tokens": tokens, "weight": 2.0, "objective/multiplier": 2 * multiplier}
        sums["entropy_coefficient"] = 0.01 * tokens
        return Metrics({name: torch.tensor(value) for name, value in sums.items()}, {"ratio": torch.tensor(1.0)})

    metrics = StepMetrics()
    metrics.update(update(0.5, 100.0), StepReport(1.0, 1e-6))
    metrics.update(update(1.5, 300.0), StepReport(1.0, 1e-6))
    with RunRecorder(tmp_path, 1) as recorder:
        recorder.write(0, metrics.summary())
    (line,) = read_metrics(tmp_path)
    assert line["objective/multiplier"] == pytest.approx(1.25)
    assert line["entropy_coefficient"] == pytest.approx(0.01)


def test_floats_keep_every_bit(tmp_path):
    with RunRecorder(tmp_path, 1) as recorder:
        recorder.write(0, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path)[0]["loss"] == 0.1 + 0.2


def test_a_clock_is_recorded_as_its_advance_per_step(tmp_path):
    times = iter([1.5, 2.0])
    with RunRecorder(tmp_path, 2) as recorder:
        recorder.add_clock("fleet", lambda: next(times))
        recorder.write(0, {})
        recorder.write(1, {})
    assert [line["seconds"]["fleet"] for line in read_metrics(tmp_path)] == [1.5, 0.5]


def test_the_samples_of_a_step_go_to_their_files_and_its_counts_to_the_metrics(tmp_path):
    with RunRecorder(tmp_path, 1) as recorder:
        recorder.evaluation((0.5, 8))
        recorder.rollout(5, *rollout(5))
        recorder.finish_step(5)
        assert recorder.sample_id(0) == "0-p-0"
        recorder.evaluation((0.75, 8))
        recorder.finish_step(6)
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == {"step": 5, "id": "0-p-0"}
    assert json.loads((tmp_path / "ledger.jsonl").read_text()) == {"step": 5, "group": "0-p"}
    line, last = read_metrics(tmp_path)
    assert (line["weight_version"], line["reward_mean"], line["refills"], line["accuracy"]) == (5, 1.0, 3, 0.5)
    assert last.keys() == {"step", "accuracy", "evaluated_prompts", "seconds"}


def test_a_resumed_run_repeats_no_line_and_drops_an_incomplete_one(tmp_path):
    with RunRecorder(tmp_path, 5) as recorder:
        for step in range(4):
            recorder.rollout(step, *rollout(step))
            recorder.finish_step(step)
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 1, "lo')
    with RunRecorder(tmp_path, 5, step=2) as recorder:
        recorder.rollout(2, *rollout(2))
        recorder.finish_step(2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    for name in ("rollouts.jsonl", "ledger.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [0, 1, 2]


def test_other_ranks_time_and_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunRecorder(None, 3) as recorder:
        with recorder.phase("train"):
            pass
        recorder.rollout(0, rollout(0)[0], StepSamples())
        recorder.logprobs(0, [])
        recorder.finish_step(0)
        recorder.summarize(resumable=False)
        assert recorder.sample_id(0) is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_step_is_a_plain_line(tmp_path, capsys):
    with RunRecorder(tmp_path, 3) as recorder:
        LOG.info("hello [red] %d", 7)
        recorder.write(0, ONE)
        LOG.warning("a server left")
        recorder.write(1, ONE)
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert lines[0] == "hello [red] 7"
    assert lines[1].split()[:3] == ["step", "reward", "accuracy"]
    assert lines[2].split()[:3] == ["0/3", "0.250", "-"]
    assert lines[3] == "warning: a server left"
    log = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == lines
    assert errors == ""


def test_messages_leave_the_console_when_the_recorder_is_closed(tmp_path, capsys, caplog):
    with RunRecorder(tmp_path, 3):
        LOG.info("inside")
    LOG.warning("outside")
    assert capsys.readouterr().out == "inside\n"
    assert caplog.messages == ["outside"]


def test_the_time_before_the_first_phase_belongs_to_no_step(tmp_path):
    with RunRecorder(tmp_path, 1) as recorder:
        time.sleep(0.2)
        with recorder.phase("rollout"):
            pass
        recorder.write(0, ONE)
    assert read_metrics(tmp_path)[0]["seconds"]["total"] < 0.1


def test_a_run_ends_with_its_accuracy_and_its_files(tmp_path, capsys):
    with RunRecorder(tmp_path, 3) as recorder:
        for step, accuracy in enumerate([0.25, 0.5, 0.875]):
            recorder.write(step, {"accuracy": accuracy})
        recorder.summarize(resumable=True)
    lines = run_summary(tmp_path, resumable=True)
    assert lines[0] == "accuracy on held-out prompts: 0.250 at the start, 0.875 at the end"
    assert lines[1] == f"run folder: {tmp_path}"
    assert [line.split()[0] for line in lines[2:-1]] == ["metrics.jsonl", "rollouts.jsonl", "console.log"]
    assert "train.resume=true" in lines[-1]
    assert capsys.readouterr().out.splitlines()[-len(lines) :] == lines


def test_a_run_without_an_evaluation_ends_too(tmp_path):
    RunRecorder(tmp_path, 3).close()
    assert run_summary(tmp_path, resumable=False)[0] == f"run folder: {tmp_path}"
