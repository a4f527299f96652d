"""A skipped collective is found: by rank, by name, by source line."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.distributed.ledger import CollectiveCall, record_collectives
from megatron_rl.distributed.mesh import World
from megatron_rl.observability.hang_watchdog import Watchdog, hang_report, missing_ranks
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.processes


def _skips_one(folder: Path, limit_seconds: float) -> None:
    record_collectives()
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    with Watchdog(folder, World(rank, size, torch.device("cpu")), limit_seconds):
        for step in range(3):
            dist.all_reduce(torch.ones(8))
            if rank < 2 and not (rank == 1 and step == 2):  # rank 1 forgets the last one
                dist.all_reduce(torch.ones(4), group=pair)
            dist.barrier()
        time.sleep(60)


def test_the_report_names_the_rank_that_skipped_a_collective(tmp_path, capfd):
    with pytest.raises(RankError, match="exited without a result"):  # each has ended itself
        run_ranks(_skips_one, 3, tmp_path, 2.0)

    text = (tmp_path / "report.txt").read_text()
    assert "rank 1 has not entered all_reduce number 3 of ranks [0,1], 16 bytes, at" in text
    assert "test_hang_watchdog.py" in text
    assert "rank 0 waits in all_reduce" in text
    assert "rank 1 waits in barrier" in text
    assert "thread MainThread" in text


def test_a_run_that_does_not_hang_leaves_no_folder(tmp_path):
    with Watchdog(tmp_path / "hang", World(0, 1, torch.device("cpu")), 60):
        pass
    assert not (tmp_path / "hang").exists()


def entry(rank_count: int, number: int, *, left: bool, group: str = "0") -> CollectiveCall:
    return CollectiveCall("all_reduce", group, range(rank_count), number, 4, "x.py:1", left)


def test_ranks_that_came_are_not_blamed():
    answers = {
        0: ([entry(3, 5, left=False)], ""),
        1: ([entry(3, 4, left=True)], ""),
        2: ([entry(3, 5, left=False)], ""),
    }

    assert set(missing_ranks(answers)) == {1}


def test_a_rank_that_does_not_answer_and_a_link_that_does_not_finish_are_told_apart():
    here = ([entry(2, 5, left=False)], "")

    assert "no answer from rank 1: dead, stopped" in hang_report({0: here}, 2, 3.0)
    assert "every rank has entered the same collectives: the network" in hang_report({0: here, 1: here}, 2, 3.0)


def _nothing_is_late(folder: Path) -> int:
    record_collectives()
    with Watchdog(folder, World(dist.get_rank(), 2, torch.device("cpu")), 1.0):
        dist.all_reduce(torch.ones(1))
        time.sleep(2.5)  # busy with something that is no collective
        dist.all_reduce(torch.ones(1))
    return os.getpid()


def test_work_between_collectives_is_no_hang(tmp_path):
    assert len(set(run_ranks(_nothing_is_late, 2, tmp_path))) == 2
