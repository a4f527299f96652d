"""A whole job killed again and again, and resumed each time, ends as if nothing had happened."""

import contextlib
import os
import random
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.models.training_checkpoint import step_of, valid_checkpoints
from megatron_rl.util.exit_codes import HUNG
from tests.e2e.job import Job, same_result

KILLS = 20
LONG = ("train.steps=60", "train.updates_per_step=1", "checkpoint.every=1")


def newest(folder: Path) -> int:
    """Return the step of a run's newest valid checkpoint."""
    found = valid_checkpoints(folder / "checkpoints")
    return step_of(found[-1]) if found else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    with Job(tmp_path / "straight", *LONG) as job:
        assert job.end() == 0, job.output()
    moments, folder = random.Random(0), tmp_path / "run"
    for kill in range(KILLS):
        reached = newest(folder)
        with Job(folder, *LONG, *(["train.resume=true"] if kill else [])) as job:
            if kill % 5 != 4:  # else before or while it comes up
                job.until(lambda before=reached: newest(folder) > before)
            time.sleep(moments.uniform(0, 0.3 if kill % 5 != 4 else 8))
            victims = [job.process, *job.ranks()]
            for victim in moments.sample(victims, len(victims)):
                victim.kill()
            job.end()
        assert newest(folder) >= reached
    with Job(folder, *LONG, "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(folder, tmp_path / "straight")


SAMPLING_KILLS = 30
RECEIVER, CONTROLLER = "megatron_rl.fleet.receiver", "megatron_rl.rollout.controller_process"


def words_of(process: psutil.Process) -> list[str]:
    """Return the command of a process; none if it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def sockets_with_files() -> set[str]:
    """Return the names of the Unix sockets that have a file."""
    rows = Path("/proc/net/unix").read_text().splitlines()
    return {row.split()[-1] for row in rows if row.split()[-1].startswith("/")}


def shared_memory_of(job: Job) -> list[str]:
    """Return what is left in /dev/shm with the number of one of the job's processes in its name."""
    numbers = {str(process.pid) for process in job.seen}
    return [
        name
        for name in os.listdir("/dev/shm")
        if numbers & set("".join(c if c.isdigit() else " " for c in name).split())
    ]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", [20261129])
def test_receivers_and_controllers_killed_at_random_moments_leave_nothing_and_change_nothing(tmp_path, seed):
    settings = (*LONG, "rollout.receivers=2")
    with Job(tmp_path / "straight", *LONG) as job:
        assert job.end() == 0, job.output()
    moments, folder, kills, restarts = random.Random(seed), tmp_path / "run", 0, 0
    sockets = sockets_with_files()
    while kills < SAMPLING_KILLS:
        with Job(folder, *settings, *(["train.resume=true"] if restarts else [])) as job:
            before, restarts, is_running = newest(folder), restarts + 1, True
            job.until(lambda before=before: newest(folder) > before)
            while is_running:
                time.sleep(moments.uniform(0, 0.5))
                name = moments.choice((RECEIVER, RECEIVER, CONTROLLER)) if kills < SAMPLING_KILLS - 1 else CONTROLLER
                victims = [process for process in job.look() if name in words_of(process)]
                if victims:
                    moments.choice(victims).kill()
                    kills += 1
                is_running = name == RECEIVER
            assert job.end() == HUNG, job.output()  # and no process is left
            assert "Traceback" not in job.output()
            assert shared_memory_of(job) == []
            assert not {name for name in sockets_with_files() - sockets if str(tmp_path) in name}
    with Job(folder, *settings, "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(folder, tmp_path / "straight")
