"""Reading of run folders: finished, old, damaged; grouping of runs."""

import json

import pytest

from megatron_rl.errors import DataError
from megatron_rl.report.groups import differences, downsample, group_runs
from megatron_rl.report.plot import Series
from megatron_rl.report.runs import read_runs
from megatron_rl.report.samples import read_samples
from tests.report.folders import metrics, sample, tokens, write_run


def test_runs_that_differ_by_their_seed_are_one_group(tmp_path):
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", [metrics(0, reward_mean=0.75), metrics(1, reward_mean=None)], train__seed=1)
    (group,) = group_runs(read_runs([first, second]))
    assert (group.label, [run.name for run in group.runs]) == ("espo", ["a", "b"])
    curve = group.curve("reward_mean")
    assert curve is not None
    assert (curve.x, curve.y) == ([0, 1, 2], [0.5, 0.375, 0.5])
    assert (curve.low, curve.high) == ([0.25, 0.375, 0.5], [0.75, 0.375, 0.5])
    assert group.curve("accuracy") is None


def test_a_long_curve_is_downsampled_to_means_of_neighbors():
    steps = list(range(1250))
    series = Series(
        "x", steps, [float(step) for step in steps], [step - 1.0 for step in steps], [step + 1.0 for step in steps]
    )
    thin = downsample(series)
    assert len(thin.x) == 417
    assert (thin.x[0], thin.y[0], thin.x[-1]) == (1, 1, 1248.5)
    assert thin.low is not None
    assert thin.high is not None
    assert (thin.low[0], thin.high[0]) == (-1, 3)
    assert downsample(thin) == thin


def test_paths_and_resuming_do_not_separate_groups(tmp_path):
    folders = [write_run(tmp_path / "a", log__path="elsewhere", train__resume=True), write_run(tmp_path / "b")]
    assert len(group_runs(read_runs(folders))) == 1


def test_labels_distinguish_groups(tmp_path):
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", optimizer__lr=1e-3),
        write_run(tmp_path / "c", objective__name="grpo"),
    ]
    groups = group_runs(read_runs(runs))
    assert [group.label for group in groups] == ["espo, lr 0.0002", "espo, lr 0.001", "grpo"]
    assert differences([group.runs for group in groups]) == {
        "objective.name": ["espo", "espo", "grpo"],
        "optimizer.lr": [2e-4, 1e-3, 2e-4],
    }


def test_a_killed_run_loses_its_last_line_only(tmp_path):
    folder = write_run(tmp_path / "a", recorded=[tokens(0, sample("r", ["a", "b"]))])
    for name in ("metrics.jsonl", "tokens.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "rew')
    (run,) = read_runs([folder])
    assert [line["step"] for line in run.lines] == [0, 1, 2]
    assert any("the last line of metrics.jsonl is incomplete" in note for note in run.notes)
    assert [line["step"] for line in read_samples(run).lines] == [0]


def test_nan_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", [metrics(0), metrics(1, reward_mean=float("nan"))])
    assert read_runs([folder])[0].values("reward_mean") == {0: 0.25}


def test_missing_files_are_noted(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "config.json").unlink()
    (run,) = read_runs([folder])
    assert any("tokens.jsonl" in note for note in run.notes)
    assert any("config.json" in note for note in run.notes)
    assert read_samples(run).recorded == 0


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"is not a run folder: it has no metrics\.jsonl"):
        read_runs([tmp_path])
    folder = write_run(tmp_path / "a")
    with pytest.raises(DataError, match="given twice"):
        read_runs([folder, folder])


def test_equal_folder_names_include_their_parents(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run"]


def test_a_long_run_shows_evenly_spaced_steps_and_counts_all(tmp_path):
    folder = write_run(tmp_path / "a", recorded=[tokens(step, sample("r", ["a"])) for step in range(101)])
    (run,) = read_runs([folder])
    samples = read_samples(run, max_steps=5)
    assert [line["step"] for line in samples.lines] == [0, 25, 50, 75, 100]
    assert samples.recorded == 101
    bins = samples.clips.bins("by_length")
    assert bins is not None
    assert (bins.names, bins.segments, bins.share(2)) == (["1", "2", ">2"], [40400, 0, 80800], 0.5)


def test_the_steps_that_are_shown_fit_in_a_page(tmp_path):
    folder = write_run(tmp_path / "a", recorded=[tokens(step, sample("r", ["a" * 1000])) for step in range(20)])
    samples = read_samples(read_runs([folder])[0], max_bytes=8000)
    assert samples.lines[0]["step"] == 0
    assert samples.lines[-1]["step"] == 19
    assert len(json.dumps(list(samples.lines))) < 16000


@pytest.mark.parametrize("cut", ["segments", "text", "advantage"])
def test_incomplete_responses_are_not_shown(tmp_path, cut):
    bad = {key: value for key, value in sample("r", ["a", "b"]).items() if key != cut}
    folder = write_run(tmp_path / "a", recorded=[tokens(0, bad), tokens(1, sample("r", ["a", "b"]))])
    assert [line["step"] for line in read_samples(read_runs([folder])[0]).lines] == [1]
