"""The element-wise passes over one tile of logits: eager in chunks of rows, or fused into one by torch.compile.

Legend: R tokens, C columns of the tile.
"""

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.ops.vocab import LOWEST_LOG, chunks_of_rows, softmax_gradient, softmax_sums, wide

log = logging.getLogger(__name__)

Options = dict[str, bool | int | str | Callable[..., object]]

INDUCTOR_OPTIONS: dict[str, Options] = {
    "cpu": {"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False},
    "cuda": {"split_reductions": False},
}
"""CPU: what the first use need not pay for. Trial programs for each vector width (what the processor reports is
believed), and precompiled headers, which pay off from the fourth kernel on and start the compiler in every later
process. GPU: a row is never split, however few rows the first call happens to have."""

FEWEST_ROWS = {"cpu": 2, "cuda": 256}
"""Tiles of fewer rows are not compiled for: a size of one would be compiled anew, a GPU would be half empty."""


@dataclass(frozen=True)
class Upstream:
    """What the slopes of a tile depend on besides its logits; [R] each, in float32 or wider.

    Attributes:
        saved_2R: what to take from the scaled logits to get log p, and the entropy of the whole vocabulary.
        u_R: upstream gradient of the log-probability by the unscaled logits, if any.
        v_R: the same of the entropy.
    """

    saved_2R: Tensor
    u_R: Tensor | None
    v_R: Tensor | None


@dataclass(frozen=True)
class Passes:
    """Both passes. ``scale`` is one over the temperature, a tensor of no dimension.

    Attributes:
        sums: (logits_RC, scale) -> (peak, total, tilt), [3, R].
        slopes: (out_RC, logits_RC, columns_R, upstream, scale) -> None; writes the gradient, may write in place.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor, Tensor, Upstream, Tensor], None]


def eager_passes() -> Passes:
    """Return the passes in plain torch, over a few rows at a time so that temporaries stay small."""
    return Passes(_eager_sums, _eager_slopes)


@cache
def compiled_passes(device_type: str) -> Passes:
    """Return the passes fused by torch.compile; eager ones for small tiles, and where no compiler works."""
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    known = config.get_config_copy()
    options: Options = {name: value for name, value in INDUCTOR_OPTIONS[device_type].items() if name in known}
    fused_sums = torch.compile(_sums, dynamic=True, options=options)
    fused_slopes = torch.compile(_slopes, dynamic=True, options=options)
    broken: list[str] = []

    def usable(logits_RC: Tensor) -> bool:
        return not broken and len(logits_RC) >= FEWEST_ROWS[device_type] and logits_RC.shape[1] > 1

    def give_up(error: BackendCompilerFailed) -> None:
        broken.append(str(error))
        log.warning("torch.compile failed, the vocabulary operation goes on without it: %s", str(error)[:2000])

    def sums(logits_RC: Tensor, scale: Tensor) -> Tensor:
        if usable(logits_RC):
            try:
                with dynamo_config.patch(disable=False):  # ``parallel.cpu`` disables it for megatron-core's functions
                    return fused_sums(logits_RC, scale)
            except BackendCompilerFailed as error:
                give_up(error)
        return _eager_sums(logits_RC, scale)

    def slopes(out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: Upstream, scale: Tensor) -> None:
        if usable(logits_RC):
            saved_2R, u_R, v_R = upstream.saved_2R, upstream.u_R, upstream.v_R
            try:
                with dynamo_config.patch(disable=False):
                    return fused_slopes(out_RC, logits_RC, columns_R, saved_2R, u_R, v_R, scale)
            except BackendCompilerFailed as error:
                give_up(error)
        return _eager_slopes(out_RC, logits_RC, columns_R, upstream, scale)

    return Passes(sums, slopes)


@cache
def compiler_found(device_type: str) -> bool:
    """Return whether torch.compile can build kernels: Triton on a GPU; a C++ compiler and Python's headers on a CPU."""
    if device_type == "cuda":
        return importlib.util.find_spec("triton") is not None
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return headers.exists() and any(shutil.which(name) for name in compilers if name)


def _sums(logits_RC: Tensor, scale: Tensor) -> Tensor:
    return softmax_sums(logits_RC * scale)


def _slopes(
    out_RC: Tensor,
    logits_RC: Tensor,
    columns_R: Tensor,
    saved_2R: Tensor,
    u_R: Tensor | None,
    v_R: Tensor | None,
    scale: Tensor,
) -> None:
    """Write u ([j = y] - p_j) - v p_j (log p_j + H), in one expression that fuses."""
    normalizers_R, entropies_R = saved_2R.unbind(0)
    logs_RC = (logits_RC.to(normalizers_R.dtype) * scale - normalizers_R[:, None]).clamp(min=LOWEST_LOG)
    powers_RC = logs_RC.exp()
    if v_R is None:
        factors_RC = torch.zeros_like(entropies_R)[:, None] if u_R is None else u_R[:, None]
    else:
        factors_RC = v_R[:, None] * (logs_RC + entropies_R[:, None])
        factors_RC = factors_RC if u_R is None else factors_RC + u_R[:, None]
    slopes_RC = -powers_RC * factors_RC
    if u_R is not None:
        hits_RC = torch.arange(logits_RC.shape[1], device=logits_RC.device) == columns_R[:, None]
        slopes_RC = torch.where(hits_RC, slopes_RC + u_R[:, None], slopes_RC)
    out_RC.copy_(slopes_RC)


def _eager_sums(logits_RC: Tensor, scale: Tensor) -> Tensor:
    parts = [softmax_sums(logits_RC[rows] * scale) for rows in chunks_of_rows(logits_RC)]
    return torch.cat(parts, 1) if parts else logits_RC.new_zeros(3, 0)


def _eager_slopes(out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: Upstream, scale: Tensor) -> None:
    for rows in chunks_of_rows(logits_RC):
        out_RC[rows] = softmax_gradient(
            logits_RC[rows].to(wide(logits_RC.dtype)) * scale,
            columns_R[rows],
            upstream.saved_2R[:, rows],
            None if upstream.u_R is None else upstream.u_R[rows],
            None if upstream.v_R is None else upstream.v_R[rows],
        )
