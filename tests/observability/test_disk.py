"""A disk that cannot be written is one error that says how to continue, and every file ends with a whole line."""

import errno
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rl.errors import TrainingError
from megatron_rl.observability.disk import AppendedFile, disk_errors
from megatron_rl.observability.recorder import RunRecorder

METRICS = {"loss": 0.5, "reward_mean": 0.1, "tokens": 9}


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let writes beyond this size of a file fail, as those to a full disk do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_does_not_fit_is_removed_again(tmp_path):
    file = AppendedFile(tmp_path / "a.jsonl")
    file.write("first\n")
    with files_limited_to(10), pytest.raises(OSError, match="File too large"):
        file.write("second\n")
    assert (tmp_path / "a.jsonl").read_text() == "first\n"
    file.write("third\n")
    file.close()
    assert (tmp_path / "a.jsonl").read_text() == "first\nthird\n"


def write_until_full(folder: Path) -> None:
    with disk_errors(folder), RunRecorder(folder, 9) as recorder:
        recorder.write(0, METRICS)
        with files_limited_to((folder / "metrics.jsonl").stat().st_size + 10):
            logging.getLogger("megatron_rl.x").warning("a message is lost rather than the run " * 20)
            recorder.write(1, METRICS)


def test_a_full_disk_is_one_error_and_the_recorder_closes_quietly(tmp_path, caplog):
    with pytest.raises(TrainingError) as caught:
        write_until_full(tmp_path)
    assert str(caught.value).startswith(f"the run folder {tmp_path} (log.path) cannot be written: ")
    assert "train.resume=true" in str(caught.value)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(line)["step"] == 0


def test_a_deleted_folder_ends_the_run_at_the_next_step(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunRecorder(folder, 9) as recorder:
        recorder.write(0, METRICS)
        shutil.rmtree(folder)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl was deleted, moved or replaced"):
            recorder.write(1, METRICS)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_the_errors_of_a_disk_are_recognized_without_a_name(tmp_path, number):
    with pytest.raises(TrainingError, match="cannot be written"), disk_errors(tmp_path):
        raise OSError(number, "words")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(TrainingError, match="cannot be written"), disk_errors(tmp_path / "run"):
        (tmp_path / "run" / "a").write_text("")
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "no"), FileNotFoundError(errno.ENOENT, "no", "/other")):
        with pytest.raises(type(error)), disk_errors(tmp_path / "run"):
            raise error


def test_lines_that_were_cut_off_or_zeroed_are_removed_from_every_file(tmp_path):
    tails = {"metrics.jsonl": b"\0" * 100, "rollouts.jsonl": b'{"step": 1, "x', "ledger.jsonl": b'{"step": 1}\0\0\n'}
    whole = json.dumps({"step": 0}).encode() + b"\n"
    for name, tail in tails.items():
        (tmp_path / name).write_bytes(whole + tail)
    with RunRecorder(tmp_path, 9, step=2):
        pass
    assert {name: (tmp_path / name).read_bytes() for name in tails} == dict.fromkeys(tails, whole)


def write(folder: Path, steps: range) -> None:
    with RunRecorder(folder, 9, step=steps.start) as recorder:
        for step in steps:
            recorder.write(step, METRICS)


def test_appending_goes_on_where_it_ended(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, range(2, 4))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
