"""Element-wise passes over one tile of logits: eager on chunks of rows, or fused by torch.compile.

Legend: R trained tokens, C columns of the tile.
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
"""CPU: avoid start-up costs. Skip the trial programs per vector width, and precompiled headers, which only pay off from
the fourth kernel on. GPU: never split the reduction of a row, whatever the number of rows in the first call."""

MIN_COMPILED_ROWS = {"cpu": 2, "cuda": 256}
"""Smaller tiles run eagerly: a size of one would be recompiled, and a GPU would be underused."""


@dataclass(frozen=True)
class UpstreamGradients:
    """Inputs of the backward pass over a tile other than its logits, in float32 or float64.

    Attributes:
        saved_2R: the value to subtract from scaled logits to get log p, and the entropy over the full vocabulary.
        u_R: upstream gradient of the log-probability, divided by the temperature; None if there is none.
        v_R: upstream gradient of the entropy, divided by the temperature; None if there is none.
    """

    saved_2R: Tensor
    u_R: Tensor | None
    v_R: Tensor | None


@dataclass(frozen=True)
class TilePasses:
    """The forward and the backward pass over a tile. ``scale`` is 1 / temperature, a zero-dimensional tensor.

    Attributes:
        sums: (logits_RC, scale) -> (peak, total, tilt), [3, R].
        slopes: (out_RC, logits_RC, columns_R, upstream, scale) -> None; writes the gradient of the logits to
            ``out_RC``,
            which may be ``logits_RC``.
    """

    sums: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor, Tensor, UpstreamGradients, Tensor], None]


def eager_passes() -> TilePasses:
    """Return the passes in eager torch, on chunks of rows to bound the size of temporaries."""
    return TilePasses(_eager_sums, _eager_slopes)


@cache
def compiled_passes(device_type: str) -> TilePasses:
    """Return the passes fused by torch.compile; small tiles, and all tiles after a compiler error, run eagerly."""
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    known = config.get_config_copy()
    options: Options = {name: value for name, value in INDUCTOR_OPTIONS[device_type].items() if name in known}
    fused_sums = torch.compile(_sums, dynamic=True, options=options)
    fused_slopes = torch.compile(_slopes, dynamic=True, options=options)
    errors: list[str] = []

    def use_compiled(logits_RC: Tensor) -> bool:
        return not errors and len(logits_RC) >= MIN_COMPILED_ROWS[device_type] and logits_RC.shape[1] > 1

    def disable(error: BackendCompilerFailed) -> None:
        errors.append(str(error))
        log.warning("torch.compile failed; the vocabulary operation runs eagerly: %s", str(error)[:2000])

    def sums(logits_RC: Tensor, scale: Tensor) -> Tensor:
        if use_compiled(logits_RC):
            try:
                with dynamo_config.patch(disable=False):  # distributed.cpu disables it for megatron-core
                    return fused_sums(logits_RC, scale)
            except BackendCompilerFailed as error:
                disable(error)
        return _eager_sums(logits_RC, scale)

    def slopes(
        out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: UpstreamGradients, scale: Tensor
    ) -> None:
        if use_compiled(logits_RC):
            saved_2R, u_R, v_R = upstream.saved_2R, upstream.u_R, upstream.v_R
            try:
                with dynamo_config.patch(disable=False):
                    return fused_slopes(out_RC, logits_RC, columns_R, saved_2R, u_R, v_R, scale)
            except BackendCompilerFailed as error:
                disable(error)
        return _eager_slopes(out_RC, logits_RC, columns_R, upstream, scale)

    return TilePasses(sums, slopes)


@cache
def compiler_found(device_type: str) -> bool:
    """Return whether torch.compile can build kernels: Triton on a GPU; a C++ compiler and Python headers on a CPU."""
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
    """Write u ([j = y] - p_j) - v p_j (log p_j + H), as one expression that torch.compile fuses."""
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


def _eager_slopes(
    out_RC: Tensor, logits_RC: Tensor, columns_R: Tensor, upstream: UpstreamGradients, scale: Tensor
) -> None:
    for rows in chunks_of_rows(logits_RC):
        out_RC[rows] = softmax_gradient(
            logits_RC[rows].to(wide(logits_RC.dtype)) * scale,
            columns_R[rows],
            upstream.saved_2R[:, rows],
            None if upstream.u_R is None else upstream.u_R[rows],
            None if upstream.v_R is None else upstream.v_R[rows],
        )
