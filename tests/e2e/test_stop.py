"""Stops: a run that is asked to stop leaves a checkpoint and no process, and goes on as if it had not been stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.job import ONE_RANK, Job, same_result

RESUME = "train.resume=true"


def test_a_stopped_run_goes_on_to_the_result_of_one_that_was_not(tmp_path, straight):
    folder = tmp_path / "run"
    with Job(folder) as job:
        job.until_steps(2).process.send_signal(signal.SIGTERM)
        assert job.end() == 130, job.output()
        assert f"to continue it: megatron-rl train {folder} (or the same command with" in job.output()
        assert "Traceback" not in job.output()
        assert len(list((folder / "checkpoints").glob("step_*"))) == 1
        assert len(job.metrics()) < 4
    with Job(folder, RESUME) as job:
        assert job.end() == 0, job.output()
    same_result(folder, straight)


def test_two_and_two_steps_are_four(tmp_path, straight):
    folder = tmp_path / "run"
    for settings in (["train.steps=2"], [RESUME]):
        with Job(folder, *settings) as job:
            assert job.end() == 0, job.output()
    same_result(folder, straight)


def test_a_run_folder_is_continued_without_its_config_file(tmp_path, straight):
    with Job(tmp_path / "run", "train.steps=2") as job:
        assert job.end() == 0, job.output()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    command = [sys.executable, "-m", "megatron_rl", "train", str(moved), "train.steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step 2 from {moved}/checkpoints/step_00000002" in done.stderr
    same_result(moved, straight)


def test_a_run_goes_on_under_another_layout(tmp_path):
    folder = tmp_path / "run"
    for settings in (["train.steps=2"], [RESUME, *ONE_RANK]):
        with Job(folder, *settings) as job:
            assert job.end() == 0, job.output()
            said = job.output()
    assert "resumed with changed settings:\n  parallel.tensor: 2 -> 1\n" in said
    assert [line["step"] for line in job.metrics()] == [0, 1, 2, 3]
    assert [line["weight_version"] for line in job.metrics()] == [0, 1, 2, 3]
    assert max(line["mismatch_max"] for line in job.metrics()) < 1e-4


def test_control_c_stops_cleanly(tmp_path):
    with Job(tmp_path / "run", *ONE_RANK, "train.steps=1000") as job:
        job.until_steps(1)
        server = job.server()
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
        server.send_signal(signal.SIGINT)  # as a container does
        assert job.end() == 130, job.output()
        assert job.output().rstrip().endswith("(or the same command with train.resume=true)")
        assert "repeat to stop immediately" in job.output()
        assert "Traceback" not in job.output()
        assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


@pytest.mark.parametrize("moment", ["ranks start", "the server starts"])
def test_a_stop_while_starting_is_quick_and_quiet(tmp_path, moment):
    folder = tmp_path / "run"
    with Job(folder) as job:
        log = folder / "servers" / "server_0.log"
        job.until(lambda: len(job.ranks()) == 2 if moment == "ranks start" else log.exists())
        began = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 130, job.output()
        assert time.monotonic() - began < 20
        assert "Traceback" not in job.output()
        assert job.metrics() == []


def test_a_second_signal_stops_at_once(tmp_path):
    with Job(tmp_path / "run", *ONE_RANK, "train.steps=1000") as job:
        (rank,) = job.until_steps(1).ranks()
        rank.suspend()  # it could not finish its step if it wanted to
        job.process.send_signal(signal.SIGTERM)
        job.until(lambda: "repeat to stop immediately" in job.output())
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 130, job.output()


def test_a_damaged_checkpoint_is_told_once_and_by_name(tmp_path, straight):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for file in (folder / "checkpoints" / "step_00000004").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with Job(folder, RESUME, "train.steps=5") as job:
        assert job.end() == 2
        assert job.output().count("was modified") == 1
        assert "Traceback" not in job.output()
