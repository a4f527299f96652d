"""Run a function on several gloo ranks, as a test: forked, timed, and cleaned up by process id."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class RankError(RuntimeError):
    """A rank raised; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Result],
    world_size: int,
    *args: object,
    timeout_seconds: float = 120.0,
    initialise: bool = True,
    start_method: Literal["fork", "spawn"] = "fork",
) -> list[Result]:
    """Return what ``function(*args)`` returned on each rank, in rank order.

    The function finds ``torch.distributed`` initialised with gloo (unless ``initialise`` is False, for code that does
    it itself: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and a free MASTER_PORT are set either way). Results are
    pickled. With ``spawn`` the function must be importable. The first rank that raises ends the others.
    """
    context = multiprocessing.get_context(start_method)
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank,
                args=(
                    function,
                    args,
                    rank,
                    world_size,
                    port,
                    Path(folder, "store") if initialise else None,
                    ends[rank][1],
                ),
                daemon=True,
            )
            for rank in range(world_size)
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
    deadline, results = time.monotonic() + timeout_seconds, {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(
                f"ranks without a result after {timeout_seconds} s: {sorted({*range(len(receivers))} - {*results})}"
            )
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                succeeded, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
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
    except BaseException:  # whatever it is, the parent must hear of it
        payload = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(payload))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
