"""The passes over one tile of logits as Triton kernels: each reads the tile once, whatever the compiler would choose.

Legend: R tokens, C columns of the tile. Run so far in Triton's interpreter only, on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.tiles import Passes, Upstream, eager_passes
from megatron_rl.ops.vocab import LOWEST_LOG

BLOCK_COLUMNS = 2048
"""Columns that one program holds in registers."""

WARPS = 8


def kernel_passes() -> Passes:
    """Return the passes as kernels; eager ones for float64."""
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

    def slopes(out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: Upstream, scale: Tensor) -> None:
        if upstream.saved_2R.dtype is torch.float64:
            eager.slopes(out_RC, logits_RC, columns_R, upstream, scale)
        elif len(logits_RC):
            _launch_slopes(out_RC, logits_RC, columns_R, upstream, scale)

    return Passes(sums, slopes)


def _launch_slopes(out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: Upstream, scale: Tensor) -> None:
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
    """Write (peak, total, tilt) of one row; what was summed is rescaled when the peak rises."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale)
    peak, total, tilt = lowest, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < columns
        z = tl.load(logits + row * columns + place, mask=inside, other=0.0).to(tl.float32) * factor
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        drop = peak - higher
        kept = tl.exp(drop)
        shifted = tl.maximum(z - higher, lowest_log)
        powers = tl.exp(shifted)
        tilt = kept * (tilt + tl.maximum(drop, lowest_log) * total) + tl.sum(shifted * powers, 0)
        total = kept * total + tl.sum(powers, 0)
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
    """Write u ([j = y] - p_j) - v p_j (log p_j + H) of one row's block; out may be logits."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    z = tl.load(logits + row * columns + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    logs = tl.maximum(z - tl.load(normalizers + row), lowest_log)
    factors = tl.zeros_like(logs)
    if HAS_V:
        factors += tl.load(vs + row) * (logs + tl.load(entropies + row))
    if HAS_U:
        factors += tl.load(us + row)
    slopes = -tl.exp(logs) * factors
    if HAS_U:
        slopes = tl.where(place == tl.load(targets + row), slopes + tl.load(us + row), slopes)
    tl.store(out + row * columns + place, slopes.to(out.dtype.element_ty), mask=inside)
