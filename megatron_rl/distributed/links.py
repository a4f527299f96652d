"""Do the ranks reach each other, with right sums, and how fast: the part of the preflight that knows ranks."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_rl.distributed.mesh import on_cuda, start_world
from megatron_rl.errors import TrainingError

BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Of each rank's buffer, by kind of device."""

REPEATS = 3


def free_gpu_bytes() -> list[int]:
    """Return the free memory of every GPU of this node."""
    if not on_cuda():
        return []
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def gpu_memory_bytes() -> int | None:
    """Return the memory of the smallest GPU of this machine; None if there is none."""
    totals = [torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count())]
    return min(totals, default=None)


def measure_links(timeout_seconds: float) -> str | None:
    """Run an all-reduce and an all-to-all over all ranks; return a line for each on the first rank, None elsewhere.

    The rate is the bus bandwidth: bytes that each rank must send, over the time.

    Raises:
        TrainingError: a sum came out wrong.
    """
    world = start_world(timeout_seconds, deterministic=False)
    size, device = world.size, world.device
    count = BYTES[device.type] // 4 // size * size
    ones = torch.ones(count, device=device)
    rows = torch.full((count,), float(world.rank), device=device)
    received = torch.empty_like(rows)
    reduce_seconds = _timed(lambda: dist.all_reduce(ones.fill_(1.0)), device)
    if not bool((ones == size).all()):
        raise TrainingError(
            f"an all-reduce of ones over {size} ranks gave {ones.unique().tolist()}: a link or a GPU lies"
        )
    exchange_seconds = _timed(lambda: dist.all_to_all_single(received, rows), device)
    expected = torch.arange(size, device=device, dtype=torch.float32).repeat_interleave(count // size)
    if not torch.equal(received, expected):
        raise TrainingError(f"an all-to-all over {size} ranks gave rank {world.rank} the wrong rows: a link lies")
    dist.destroy_process_group()
    if not world.is_main:
        return None
    sent = 4 * count * (size - 1) / size
    lines = [
        f"preflight: {name} over {size} ranks, {4 * count} bytes each: {seconds * 1e3:.1f} ms,"
        f" {factor * sent / seconds / 1e9:.2f} GB/s a rank"
        for name, seconds, factor in (("all-reduce", reduce_seconds, 2), ("all-to-all", exchange_seconds, 1))
    ]
    return "\n".join(lines) + "\n"


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of a few calls, after one that builds the connections."""
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
