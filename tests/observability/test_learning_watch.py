"""A run that works and learns nothing gets one warning per cause, with what to change."""

import json
import logging
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.observability.learning_watch import CONSECUTIVE_STEPS, LearningWatch
from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.report.runs import read_runs

GOOD = {
    "loss": 0.1,
    "reward_mean": 0.4,
    "truncated_fraction": 0.1,
    "zero_variance_fraction": 0.2,
    "unverified_fraction": 0.0,
    "grad_norm": 0.3,
    "tokens": 10,
    "reward/format": 0.5,
    "turns_max": 3,
}
WORDS = ["model.path=x", "reward.format=think", "environment.name=calculator", "rollout.sampling.max_new_tokens=64"]


def watch() -> LearningWatch:
    return LearningWatch(load(Run, [], WORDS).run)


def warnings_of(**bad: float) -> dict[str, str]:
    """Return the warnings after enough steps with these metrics."""
    found: dict[str, str] = {}
    one = watch()
    for _ in range(CONSECUTIVE_STEPS):
        assert found == {}
        found = one.warnings(GOOD | bad)
    return found


def test_a_run_that_learns_has_no_warning():
    assert warnings_of() == {}


@pytest.mark.parametrize(
    ("bad", "cause", "words"),
    [
        ({"truncated_fraction": 0.97}, "truncated", ["97% of the responses", "rollout.sampling.max_new_tokens = 64"]),
        ({"zero_variance_fraction": 0.875, "reward_mean": 0.01}, "no signal", ["88% of the groups", "easier prompts"]),
        ({"zero_variance_fraction": 1, "reward_mean": 1}, "no signal", ["almost every response is right"]),
        ({"zero_variance_fraction": 0.9}, "no signal", ["the responses to a prompt agree", "temperature"]),
        ({"unverified_fraction": 0.6}, "unverified", ["60% of the responses have no reward", "rollouts.jsonl"]),
        ({"grad_norm": 0}, "no gradient", ["the gradient is 0 although", "clipped_fraction"]),
        ({"reward/format": 0}, "format", ["no response matches reward.format = 'think'"]),
        ({"turns_max": 1}, "one turn", ["calculator (environment.name) never answered"]),
    ],
)
def test_a_cause_that_lasts_is_one_warning_with_a_remedy(bad, cause, words):
    found = warnings_of(**bad)
    assert list(found) == [cause]
    assert all(word in found[cause] for word in words)


def test_truncation_is_named_as_the_cause_of_missing_signal():
    found = warnings_of(truncated_fraction=0.97, zero_variance_fraction=0.875, reward_mean=0.031)
    assert list(found) == ["truncated", "no signal"]
    assert "most responses are truncated" in found["no signal"]


def test_a_cause_is_reported_once_and_only_if_it_lasts():
    one, bad = watch(), GOOD | {"truncated_fraction": 0.9}
    steps = [bad, bad, GOOD, bad, bad, bad, bad, GOOD, bad, bad, bad]
    assert [list(one.warnings(metrics)) for metrics in steps] == [[]] * 5 + [["truncated"]] + [[]] * 5
    assert watch().warnings({"accuracy": 0.5}) == {}  # the line of the final evaluation


def test_warnings_are_on_the_console_in_a_file_and_in_the_report(tmp_path: Path, caplog, capsys):
    caplog.set_level(logging.INFO)
    with RunRecorder(tmp_path, 5, watch=watch(), terminal=False) as recorder:
        for step in range(4):
            recorder.write(step, GOOD | {"truncated_fraction": 0.97, "weight_version": step})
    (line,) = [json.loads(text) for text in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert (line["step"], line["cause"]) == (2, "truncated")
    assert line["warning"] in capsys.readouterr().out
    assert line["warning"] in (tmp_path / "console.log").read_text()
    (run,) = read_runs([tmp_path])
    assert f"step 2: {line['warning']}" in run.notes
    with RunRecorder(tmp_path, 5, 1):  # a resumed run drops the warnings of steps that it repeats
        pass
    assert (tmp_path / "warnings.jsonl").read_text() == ""


def test_the_console_shows_length_truncation_and_groups_without_signal(tmp_path: Path, capsys):
    with RunRecorder(tmp_path, 5, terminal=False) as recorder:
        recorder.write(0, GOOD | {"response_tokens_mean": 1234.4})
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["step", "reward", "accuracy", "length", "cut", "equal"]
    assert row.split()[:6] == ["0/5", "0.400", "-", "1,234", "10%", "20%"]
