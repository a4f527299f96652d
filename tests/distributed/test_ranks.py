import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.processes


def test_results_come_back_in_rank_order():
    def share() -> tuple[int, torch.Tensor]:
        total = torch.tensor([dist.get_rank() + 1.0])
        dist.all_reduce(total)
        return dist.get_rank(), total

    results = run_ranks(share, 3)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [total.item() for _, total in results] == [6.0, 6.0, 6.0]


def test_an_exception_on_one_rank_ends_all_and_is_shown():
    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank one objects")
        dist.barrier()

    with pytest.raises(RankError, match="rank one objects"):
        run_ranks(fail, 2)


def test_a_rank_that_dies_is_an_error():
    with pytest.raises(RankError, match="exited without a result"):
        run_ranks(lambda: os._exit(3), 1)


def test_a_rank_that_hangs_is_an_error_and_is_gone_afterwards(tmp_path):
    def hang() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    with pytest.raises(TimeoutError, match=r"\[0\]"):
        run_ranks(hang, 1, timeout_seconds=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
