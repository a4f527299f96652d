"""The passes over one tile of logits as Triton kernels, each of which reads the tile once.

Legend: R trained tokens, C columns of the tile. So far these kernels have only run in Triton's interpreter, on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.tiles import TilePasses, UpstreamGradients, eager_passes
from megatron_rl.ops.vocab import LOWEST_LOG

BLOCK_COLUMNS = 2048
"""Columns that one Triton program processes at a time."""

WARPS = 8


def kernel_passes() -> TilePasses:
    """Return the passes as Triton kernels; float64 runs eagerly."""
    eager = eager_passes()

    def sums(logits_RC: Tensor, scale: Tensor) -> Tensor:
        if logits_RC.dtype is torch.float64:
            return eager.sums(logits_RC, scale)
        sums_3R = torch.empty(3, len(logits_RC), dtype=torch.float32, device=logits_RC.device)
        if len(logits_RC):
            lowest = torch.finfo(torch.float32).min / 2
            _sums_kernel[(len(logits_RC),)](
                logits_RC, sums_3R, scale, *logits_RC.shape, lowest, LOWEST_LOG, BLOCK_COLUMNS, num_warps=WARPS
            )
        return sums_3R

    def slopes(
        out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: UpstreamGradients, scale: Tensor
    ) -> None:
        if upstream.saved_2R.dtype is torch.float64:
            eager.slopes(out_RC, logits_RC, columns_R, upstream, scale)
        elif len(logits_RC):
            _launch_slopes(out_RC, logits_RC, columns_R, upstream, scale)

    return TilePasses(sums, slopes)


def _launch_slopes(
    out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: UpstreamGradients, scale: Tensor
) -> None:
    num_rows, columns = logits_RC.shape
    normalizers_R, entropies_R = upstream.saved_2R
    u_R, v_R = upstream.u_R, upstream.v_R
    _slopes_kernel[(num_rows, triton.cdiv(columns, BLOCK_COLUMNS))](
        out_RC,
        logits_RC,
        columns_R,
        normalizers_R,
        entropies_R,
        entropies_R if u_R is None else u_R,
        entropies_R if v_R is None else v_R,
        scale,
        columns,
        LOWEST_LOG,
        u_R is not None,
        v_R is not None,
        BLOCK_COLUMNS,
        num_warps=WARPS,
    )


@triton.jit
def _sums_kernel(
    logits: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    columns: tl.tensor,
    lowest: tl.tensor,
    lowest_log: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write (peak, total, tilt) of one row; running sums are rescaled whenever the peak increases."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale)
    peak, total, tilt = lowest, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32) * factor
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        drop = peak - higher
        decay = tl.exp(drop)
        shifted = tl.maximum(z - higher, lowest_log)
        powers = tl.exp(shifted)
        tilt = decay * (tilt + tl.maximum(drop, lowest_log) * total) + tl.sum(shifted * powers, 0)
        total = decay * total + tl.sum(powers, 0)
        peak = higher
    tl.store(sums + row, peak)
    tl.store(sums + num_rows + row, total)
    tl.store(sums + 2 * num_rows + row, tilt)


@triton.jit
def _slopes_kernel(
    out: tl.tensor,
    logits: tl.tensor,
    targets: tl.tensor,
    normalizers: tl.tensor,
    entropies: tl.tensor,
    us: tl.tensor,
    vs: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    lowest_log: tl.tensor,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write u ([j = y] - p_j) - v p_j (log p_j + H) for one block of one row; ``out`` may be ``logits``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    z = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    logs = tl.maximum(z - tl.load(normalizers + row), lowest_log)
    factors = tl.zeros_like(logs)
    if HAS_V:
        factors += tl.load(vs + row) * (logs + tl.load(entropies + row))
    if HAS_U:
        factors += tl.load(us + row)
    slopes = -tl.exp(logs) * factors
    if HAS_U:
        slopes = tl.where(column == tl.load(targets + row), slopes + tl.load(us + row), slopes)
    tl.store(out + row * columns + column, slopes.to(out.dtype.element_ty), mask=inside)
