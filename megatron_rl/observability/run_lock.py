"""The lock of a run folder: one run at a time writes to it.

``RUN/lock`` names the process that holds it: host, process id, start time, Slurm job. It is empty if none does. A lock
is stale if its process has ended, or if it is of an earlier start of the same Slurm job.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_rl.errors import ConfigError

LOCK = "lock"
"""File name of the lock in the run folder."""

MAX_DIFFERENCE_SECONDS = 2.0
"""Start times of one process that differ by less are equal: they are read from clocks that are adjusted."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created.

    Raises:
        ConfigError: another run holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {folder} (log.path): {error.strerror}") from error
    with file:
        # Between the processes of one machine flock decides, also if two of them find a stale lock at the same time.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        except OSError:  # a file system without flock
            is_free = True
        owner = _read(path)
        if not is_free or _is_alive(owner):
            raise ConfigError(
                f"another run writes to {folder} (log.path): process {owner.get('pid')} on {owner.get('host')}; stop"
                f" it, or write another log.path. If it has ended, delete {path}"
            )
        _write(path, json.dumps(_this_process()))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder was deleted, or the disk is full: the lock is stale soon
                _write(path, "")


def _this_process() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start_time": psutil.Process().create_time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }


def _read(path: Path) -> Mapping[str, object]:
    """Return the owner of a lock; an empty one if there is none, or if the file was damaged."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8", errors="replace") or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")  # the same file, on which the lock is


def _is_alive(owner: Mapping[str, object]) -> bool:
    """Return whether the owner of a lock may still write."""
    if not owner:
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if owner.get("host") != socket.gethostname():
        return not job or owner.get("slurm_job") != job  # a requeued job keeps its number, and its last start has ended
    try:
        started = psutil.Process(int(str(owner.get("pid")))).create_time()
        return abs(started - float(str(owner.get("start_time")))) < MAX_DIFFERENCE_SECONDS
    except (psutil.NoSuchProcess, ValueError):
        return False
