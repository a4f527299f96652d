"""Checks the links between all ranks for the preflight: correct results and bandwidth of two collectives."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_rl.distributed.mesh import on_cuda, start_world
from megatron_rl.errors import TrainingError

BUFFER_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Buffer size per rank, by device type."""

REPEATS = 3


def free_gpu_bytes() -> list[int]:
    """Return the free memory of every GPU of this node, bytes."""
    if not on_cuda():
        return []
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def gpu_memory_bytes() -> int | None:
    """Return the memory of the smallest GPU of this node, bytes; None without a GPU."""
    totals = [torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count())]
    return min(totals, default=None)


def measure_links(timeout_seconds: float) -> str | None:
    """Run an all-reduce and an all-to-all over all ranks; return one line of text per collective on rank 0, else None.

    The reported rate is the bus bandwidth: bytes that each rank must send, divided by the time.

    Raises:
        TrainingError: a collective returned wrong values.
    """
    world = start_world(timeout_seconds, deterministic=False)
    size, device = world.size, world.device
    count = BUFFER_BYTES[device.type] // 4 // size * size
    ones = torch.ones(count, device=device)
    rows = torch.full((count,), float(world.rank), device=device)
    received = torch.empty_like(rows)
    reduce_seconds = _timed(lambda: dist.all_reduce(ones.fill_(1.0)), device)
    if not bool((ones == size).all()):
        raise TrainingError(
            f"an all-reduce of ones over {size} ranks gave {ones.unique().tolist()}: a link or a GPU corrupts data"
        )
    exchange_seconds = _timed(lambda: dist.all_to_all_single(received, rows), device)
    expected = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(count // size)
    if not torch.equal(received, expected):
        raise TrainingError(f"an all-to-all over {size} ranks sent rank {world.rank} wrong rows: a link corrupts data")
    dist.destroy_process_group()
    if not world.is_main:
        return None
    sent = 4 * count * (size - 1) / size
    lines = [
        f"preflight: {name} over {size} ranks, {4 * count} bytes each: {seconds * 1e3:.1f} ms,"
        f" {factor * sent / seconds / 1e9:.2f} GB/s per rank"
        for name, seconds, factor in (("all-reduce", reduce_seconds, 2), ("all-to-all", exchange_seconds, 1))
    ]
    return "\n".join(lines) + "\n"


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of the fastest of ``REPEATS`` calls, seconds, after one call that sets up connections."""
    best = float("inf")
    call()
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
