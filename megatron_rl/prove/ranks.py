"""Ranks of a layout, forked from a process that has imported everything, which saves tens of seconds per layout."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_rl.errors import MegatronRLError, TrainingError
from megatron_rl.util.child_process import end_with_parent
from megatron_rl.util.ports import free_port


def run_forked(folder: Path, count: int, layout: str) -> None:
    """Run ``count`` ranks of ``prove.rank`` on ``folder`` and wait until all have ended.

    Raises:
        TrainingError: a rank failed. Its message is on stderr.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models do not profit from more threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_rl.prove.preload"])
    port = free_port()
    ranks = [context.Process(target=_rank, args=(folder, rank, count, port), daemon=True) for rank in range(count)]
    try:
        for process in ranks:
            process.start()
        _wait(ranks, layout)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _wait(ranks: Sequence[BaseProcess], layout: str) -> None:
    while any(process.is_alive() for process in ranks):
        failed = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode]
        if failed:
            break
        time.sleep(0.05)
    failed = [(rank, process.exitcode) for rank, process in enumerate(ranks) if process.exitcode]
    if failed:
        rank, code = failed[0]
        raise TrainingError(f"rank {rank} of layout {layout} ended with exit code {code}; its message is above")


def _rank(folder: Path, rank: int, count: int, port: int) -> None:
    end_with_parent()  # the parent is the fork server, which ends with the main process
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from megatron_rl.prove.rank import main

    try:
        main(folder)
    except MegatronRLError as error:
        sys.stderr.write(f"megatron-rl prove, rank {rank}: {error}\n")
        sys.exit(2)
