"""A skipped collective is found: by rank, by name, by source line."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.distributed.ledger import CollectiveCall, Ledger, _works, record_collectives
from megatron_rl.distributed.main_rank import main_rank
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

    assert "no answer from rank 1: dead, stopped" in hang_report({0: here}, {}, 2, 3.0)
    assert "every rank has entered the same collectives: the network" in hang_report({0: here, 1: here}, {}, 2, 3.0)


def _nothing_is_late(folder: Path) -> int:
    record_collectives()
    with Watchdog(folder, World(dist.get_rank(), 2, torch.device("cpu")), 1.0):
        dist.all_reduce(torch.ones(1))
        time.sleep(2.5)  # busy with something that is no collective
        dist.all_reduce(torch.ones(1))
    return os.getpid()


def test_work_between_collectives_is_no_hang(tmp_path):
    assert len(set(run_ranks(_nothing_is_late, 2, tmp_path))) == 2


class Enqueued(dist.Work):
    """The work of a collective that has returned and not finished, as NCCL's."""

    def is_completed(self) -> bool:
        return False


def _returns_at_once(folder: Path) -> None:
    ledger = record_collectives()
    with Watchdog(folder, World(dist.get_rank(), 2, torch.device("cpu")), 1.5):
        if dist.get_rank() == 1:
            entry = ledger.enter("broadcast", None, 4, "here.py:1")
            work = Enqueued()
            ledger.leave(entry, _works(work))
        time.sleep(30)


def test_a_collective_that_returned_but_does_not_finish_is_a_hang(tmp_path):
    with pytest.raises(RankError, match="exited without a result"):
        run_ranks(_returns_at_once, 2, tmp_path)
    assert "rank 1 waits in broadcast number 1" in (tmp_path / "report.txt").read_text()


def test_asynchronous_work_is_asked_and_dropped_work_is_done():
    ledger = Ledger()
    work = Enqueued()
    entry = ledger.enter("broadcast", None, 4, "here.py:1")
    ledger.leave(entry, _works(work))
    ledger.poll()
    assert ledger.waiting() is entry
    del work
    ledger.poll()
    assert ledger.waiting() is None


def _message(folder: Path) -> None:
    record_collectives()
    with Watchdog(folder, World(dist.get_rank(), 3, torch.device("cpu")), 1.5):
        if dist.get_rank() == 0:
            dist.send(torch.ones(4), dst=2)
        if dist.get_rank() == 2:
            dist.recv(torch.ones(4), src=0)
            dist.recv(torch.ones(4), src=0)
        time.sleep(30)


def test_a_message_that_is_not_sent_names_its_sender(tmp_path):
    with pytest.raises(RankError, match="exited without a result"):
        run_ranks(_message, 3, tmp_path)
    text = (tmp_path / "report.txt").read_text()
    assert "rank 0 has not entered recv number 2 of ranks [0,2], 16 bytes" in text
    assert "its last of that group was number 1" in text


def _main_rank_waits(folder: Path, moves: bool) -> str:
    """Let rank 0 wait for three times the limit, with or without progress, and the other rank for rank 0."""
    record_collectives()
    began = time.monotonic()
    with Watchdog(folder, World(dist.get_rank(), 2, torch.device("cpu")), 1.0):
        if dist.get_rank() == 0:
            progress = (lambda: int(10 * time.monotonic())) if moves else (lambda: 7)
            with main_rank().waits_for("the samples of step 3", progress):
                time.sleep(3.5)
            main_rank().release()
        else:
            main_rank().wait()
        dist.barrier()
    return f"{time.monotonic() - began:.0f}"


def test_a_main_rank_that_waits_for_something_that_moves_is_no_hang(tmp_path):
    assert len(run_ranks(_main_rank_waits, 2, tmp_path, True)) == 2
    assert not (tmp_path / "report.txt").exists()


def test_a_main_rank_that_waits_for_something_that_stands_is_named_with_it(tmp_path):
    with pytest.raises(RankError, match="exited without a result"):
        run_ranks(_main_rank_waits, 2, tmp_path, False)
    text = (tmp_path / "report.txt").read_text()
    assert "rank 0 waits for the samples of step 3, which makes no progress" in text
    assert "rank 1 waits in wait for the main rank number 1" in text
