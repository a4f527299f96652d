"""Work in jobs that survive a kill: each leaves its record on disk, and a second run does only what is missing.

Everything is written to a folder beside the target, which gets the target's name when all jobs are done and no sooner.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_rl.convert.manifest import FileRecord
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.util.atomic import commit_folder, flush_to_disk, replaced

ProgressFn = Callable[[int], None]
"""Told of bytes as they are done."""

_JOBS, _PLAN = ".jobs", "plan.json"


@dataclass(frozen=True)
class FileJob:
    """A piece of work that writes one file.

    Attributes:
        file: its name, in the target.
        num_bytes: what ``ProgressFn`` will have been told at the end.
        work: writes to the open file, and returns the record.
    """

    file: str
    num_bytes: int
    work: Callable[[BinaryIO, ProgressFn], FileRecord]


class _FinishedJob(BaseModel):
    """A job's record, and the size of its file."""

    bytes: int
    record: FileRecord


class Staging:
    """The folder beside the target."""

    def __init__(self, target: Path, plan: Mapping[str, object]) -> None:
        if target.exists():
            raise ConfigError(f"{target} is there already; remove it, or give another folder")
        self.target = target
        self.folder = target.with_name(f".{target.name}.part")
        self._records = self.folder / _JOBS
        self._records.mkdir(parents=True, exist_ok=True)
        self._lock = (self._records / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another conversion is writing {self.folder}; wait for it, or end it") from None
        text = json.dumps(plan, sort_keys=True)
        if not (self._records / _PLAN).is_file() or (self._records / _PLAN).read_text() != text:
            self._forget()
            _write_durably(self._records / _PLAN, text)

    def _forget(self) -> None:
        """Remove what another plan has left."""
        for path in self.folder.iterdir():
            if path != self._records:
                path.unlink()
        for path in self._records.iterdir():
            if path.name != "lock":
                path.unlink()

    def record(self, job: FileJob) -> FileRecord | None:
        """Return what a finished job has left; None if it is to be done."""
        path, data = self._records / f"{job.file}.json", self.folder / job.file
        if not path.is_file() or not data.is_file():
            return None
        entry = _FinishedJob.model_validate_json(path.read_bytes())
        return entry.record if entry.bytes == data.stat().st_size else None

    def do(self, job: FileJob, report: ProgressFn) -> FileRecord:
        """Do a job, and leave its record once its file is on disk."""
        data = self.folder / job.file
        with data.open("wb") as file:
            record = job.work(file, report)
        flush_to_disk(data)
        entry = _FinishedJob(bytes=data.stat().st_size, record=record)
        _write_durably(self._records / f"{job.file}.json", entry.model_dump_json())
        return record

    def publish(self) -> None:
        """Give the folder its final name."""
        shutil.rmtree(self._records)
        commit_folder(self.folder, self.target)
        self._lock.close()


def _write_durably(path: Path, text: str) -> None:
    with replaced(path, durable=True) as file:
        file.write(text.encode())


def run_jobs(staging: Staging, jobs: Sequence[FileJob], threads: int, console: Console) -> list[FileRecord]:
    """Do all jobs that are not done, several at once, under a progress bar; return all records in order.

    Raises:
        DataError: of the first job that failed; the others' files stay for the next run.
    """
    records = {job.file: record for job in jobs if (record := staging.record(job)) is not None}
    if records:
        console.print(f"{len(records)} of {len(jobs)} files are there from an earlier run")
    with progress_bar(console, sum(job.num_bytes for job in jobs)) as report:
        for job in jobs:
            report(job.num_bytes if job.file in records else 0)
        with ThreadPoolExecutor(threads) as pool:
            futures = {pool.submit(staging.do, job, report): job for job in jobs if job.file not in records}
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            for future in done:
                records[futures[future].file] = future.result()
    return [records[job.file] for job in jobs]


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[ProgressFn]:
    """Show bytes done, speed and time left while the block runs; off a terminal, nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def enough_room(folder: Path, needed: int) -> None:
    """Raise a DataError if the file system that a folder will be on has less room than that."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(f"{existing} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
