"""Resumable conversion jobs: each job records its result on disk, and a later run does only the missing jobs.

Files are written to a staging folder next to the target, which is renamed to the target when all jobs are done.
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
"""Called with the number of bytes that were processed since the last call."""

_JOBS, _PLAN = ".jobs", "plan.json"


@dataclass(frozen=True)
class FileJob:
    """A job that writes one file.

    Attributes:
        file: name of the file in the target folder.
        num_bytes: sum of the arguments of the ``ProgressFn`` calls of the job.
        work: writes to the open file and returns the record.
    """

    file: str
    num_bytes: int
    work: Callable[[BinaryIO, ProgressFn], FileRecord]


class _FinishedJob(BaseModel):
    """The record of a job, and the size of its file."""

    bytes: int
    record: FileRecord


class StagingFolder:
    """The folder that conversion writes to, next to the target.

    Raises:
        ConfigError: the target exists, or another conversion to it is running.
    """

    def __init__(self, target: Path, plan: Mapping[str, object]) -> None:
        if target.exists():
            raise ConfigError(f"{target} exists; remove it, or give another folder")
        self.target = target
        self.folder = target.with_name(f".{target.name}.part")
        self._jobs_folder = self.folder / _JOBS
        self._jobs_folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._jobs_folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another conversion is writing {self.folder}; wait for it, or end it") from None
        text = json.dumps(plan, sort_keys=True)
        if not (self._jobs_folder / _PLAN).is_file() or (self._jobs_folder / _PLAN).read_text() != text:
            self._clear()
            _write_durably(self._jobs_folder / _PLAN, text)

    def _clear(self) -> None:
        """Remove the files of a conversion with another plan."""
        for path in self.folder.iterdir():
            if path != self._jobs_folder:
                path.unlink()
        for path in self._jobs_folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def record(self, job: FileJob) -> FileRecord | None:
        """Return the record of a finished job; None if the job must run."""
        path, data = self._jobs_folder / f"{job.file}.json", self.folder / job.file
        if not path.is_file() or not data.is_file():
            return None
        entry = _FinishedJob.model_validate_json(path.read_bytes())
        return entry.record if entry.bytes == data.stat().st_size else None

    def run(self, job: FileJob, report: ProgressFn) -> FileRecord:
        """Run a job, and write its record when its file is on disk."""
        data = self.folder / job.file
        with data.open("wb") as file:
            record = job.work(file, report)
        flush_to_disk(data)
        entry = _FinishedJob(bytes=data.stat().st_size, record=record)
        _write_durably(self._jobs_folder / f"{job.file}.json", entry.model_dump_json())
        return record

    def publish(self) -> None:
        """Rename the folder to the target."""
        shutil.rmtree(self._jobs_folder)
        commit_folder(self.folder, self.target)
        self._lock.close()


def _write_durably(path: Path, text: str) -> None:
    with replaced(path, durable=True) as file:
        file.write(text.encode())


def run_jobs(staging: StagingFolder, jobs: Sequence[FileJob], threads: int, console: Console) -> list[FileRecord]:
    """Run the unfinished jobs in parallel, with a progress bar; return the records of all jobs in order.

    Raises:
        DataError: a job failed; finished jobs are kept for the next run.
    """
    records = {job.file: record for job in jobs if (record := staging.record(job)) is not None}
    if records:
        console.print(f"{len(records)} of {len(jobs)} files are finished from an earlier run")
    with progress_bar(console, sum(job.num_bytes for job in jobs)) as report:
        for job in jobs:
            report(job.num_bytes if job.file in records else 0)
        with ThreadPoolExecutor(threads) as pool:
            futures = {pool.submit(staging.run, job, report): job for job in jobs if job.file not in records}
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            for future in done:
                records[futures[future].file] = future.result()
    return [records[job.file] for job in jobs]


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[ProgressFn]:
    """Show bytes done, speed and time left while the block runs. Without a terminal, show nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def check_disk_space(folder: Path, needed: int) -> None:
    """Check that the file system of a folder, which need not exist yet, has ``needed`` bytes free.

    Raises:
        DataError: it has less.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(f"{existing} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
