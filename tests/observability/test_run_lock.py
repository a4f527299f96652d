"""The lock of a run folder: two processes never write at the same time, and a lock of an ended one holds up nobody."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_rl.errors import ConfigError
from megatron_rl.observability.run_folder import keep_steps_before
from megatron_rl.observability.run_lock import LOCK, locked

OTHER = {"host": "another-host", "pid": 1, "start_time": 0.0, "slurm_job": "7"}


def holder(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its standard input is closed."""
    code = (
        "import sys, pathlib\nfrom megatron_rl.observability.run_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.processes
def test_a_second_run_is_refused_with_host_and_process_until_the_first_ends(tmp_path):
    process = holder(tmp_path)
    with (
        pytest.raises(ConfigError, match=rf"process {process.pid} on {socket.gethostname()}; stop it"),
        locked(tmp_path),
    ):
        pass
    process.communicate()
    with locked(tmp_path):
        pass


@pytest.mark.processes
def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_process_id_that_was_used_again_is_not_the_owner(tmp_path):
    created = psutil.Process().create_time()
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "start_time": created - 100, "slurm_job": ""}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    with locked(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**owner, "start_time": created}))
    with pytest.raises(ConfigError, match="another run writes"), locked(tmp_path):
        pass


def test_only_a_requeued_job_passes_the_lock_of_another_host(tmp_path, monkeypatch):
    for job, passes in (("7", True), ("8", False), ("", False)):
        (tmp_path / LOCK).write_text(json.dumps(OTHER))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        if passes:
            with locked(tmp_path):
                pass
        else:
            with pytest.raises(ConfigError, match="process 1 on another-host"), locked(tmp_path):
                pass


@pytest.mark.parametrize("text", ["", "\0\0\0", "{", "[]", '{"host": '])
def test_a_damaged_lock_is_no_lock(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with locked(tmp_path):
        pass


def test_a_folder_that_is_deleted_meanwhile_is_no_error_at_the_end(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()


@pytest.mark.parametrize(
    "tail", [b"\0" * 4096, b"\0" * 10 + b"\n", b'{"step": 3, "lo', b'{"st\n', b"[1]\n", b"7\n", b"\xff\n"]
)
def test_a_torn_tail_is_removed_and_nothing_else(tmp_path, tail):
    path, lines = tmp_path / "metrics.jsonl", b"".join(b'{"step": %d}\n' % step for step in range(3))
    path.write_bytes(lines + tail)
    keep_steps_before(path, 5)
    assert path.read_bytes() == lines
