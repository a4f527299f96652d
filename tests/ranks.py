"""Runs a function on several gloo ranks in forked processes, with a time limit; all of them are ended afterwards."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rl.util.ports import free_port

Result = TypeVar("Result")


class RankError(RuntimeError):
    """A rank raised; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Result],
    world_size: int,
    *args: object,
    timeout_seconds: float = 120.0,
    initialize: bool = True,
) -> list[Result]:
    """Return what ``function(*args)`` returned on each rank, in rank order.

    ``torch.distributed`` is initialized with gloo before the call, unless ``initialize`` is False for code that does so
    itself; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and a free MASTER_PORT are set in both cases. Results are pickled.
    Ranks inherit what this process has imported. The first rank that raises ends the others.

    Raises:
        RankError: a rank raised or exited without a result.
        TimeoutError: a rank has no result after ``timeout_seconds``.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        store = Path(folder, "store") if initialize else None
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank, args=(function, args, rank, world_size, port, store, sender), daemon=True)
            for rank, (_, sender) in enumerate(ends)
        ]
        try:
            for process, (_, sender) in zip(processes, ends, strict=True):
                process.start()
                sender.close()
            return _collect([receiver for receiver, _ in ends], timeout_seconds)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _collect(receivers: list[Connection], timeout_seconds: float) -> list[Result]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Result] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(
                f"ranks without a result after {timeout_seconds} s: {sorted({*range(len(receivers))} - {*results})}"
            )
        for rank, receiver in enumerate(receivers):
            if receiver not in ready:
                continue
            try:
                succeeded, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} exited without a result") from None
            if not succeeded:
                raise RankError(f"rank {rank} raised:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    function: Callable[..., Result],
    args: tuple[object, ...],
    rank: int,
    world_size: int,
    port: int,
    store: Path | None,
    sender: Connection,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        if store is not None:
            dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world_size)
        payload = (True, function(*args))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:  # reported to the parent, which raises it
        payload = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(payload))
