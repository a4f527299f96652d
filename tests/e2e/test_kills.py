"""A whole job killed again and again, and resumed each time, ends as if nothing had happened."""

import random
import time

import pytest

from megatron_rl.models.training_checkpoint import step_of, valid_checkpoints
from tests.e2e.job import Job, same_result

KILLS = 20
LONG = ("train.steps=60", "train.updates_per_step=1", "checkpoint.every=1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    with Job(tmp_path / "straight", *LONG) as job:
        assert job.end() == 0, job.output()
    moments, folder = random.Random(0), tmp_path / "run"

    def newest() -> int:
        found = valid_checkpoints(folder / "checkpoints")
        return step_of(found[-1]) if found else 0

    for kill in range(KILLS):
        reached = newest()
        with Job(folder, *LONG, *(["train.resume=true"] if kill else [])) as job:
            if kill % 5 != 4:  # else before or while it comes up
                job.until(lambda before=reached: newest() > before)
            time.sleep(moments.uniform(0, 0.3 if kill % 5 != 4 else 8))
            victims = [job.process, *job.ranks()]
            for victim in moments.sample(victims, len(victims)):
                victim.kill()
            job.end()
        assert newest() >= reached
    with Job(folder, *LONG, "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(folder, tmp_path / "straight")
