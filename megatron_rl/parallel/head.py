"""The fused LM head: log-probabilities and entropies straight from hidden states, without ever holding the logits.

Legend: R tokens, H hidden size, V this rank's shard of the vocabulary, C columns of one tile.

The logits exist one tile at a time, and are computed again in the backward pass; two floats per token are kept. Sums
are formed in float32 or wider: products of the forward pass take inputs widened to float32 (a CPU has no bfloat16
product with a float32 result; a GPU does), products of the backward pass stay in the inputs' type and are added up in
float32.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.errors import ConfigError
from megatron_rl.parallel.collectives import Group, group_rank
from megatron_rl.parallel.vocab import (
    Context,
    finish,
    merge_sums,
    pick,
    softmax_gradient,
    softmax_sums,
    vocab_logprobs_entropies,
    wide,
)

Backend = Literal["auto", "plain", "tiles", "tiles+compile"]
"""``plain`` holds all logits (the reference), ``tiles`` runs eagerly, ``tiles+compile`` fuses the element-wise passes;
``auto`` is the last where a compiler is found and there is more than one tile, else ``tiles``."""

BACKENDS: tuple[Backend, ...] = ("auto", "plain", "tiles", "tiles+compile")

BACKEND_VARIABLE = "MEGATRON_RL_HEAD"
"""Environment variable that says what ``auto`` is."""

TILE_COLUMNS = 8192


@dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary a rank computes, and how.

    Attributes:
        first_id: token id of the first row of the rank's weight.
        rows: rows that are tokens of the model; those after are padding.
        temperature: divides the logits.
        group: the ranks that share the vocabulary.
        sums: ``softmax_sums`` or its compiled form.
        gradient: ``softmax_gradient`` or its compiled form.
    """

    first_id: int
    rows: int
    temperature: float
    group: Group
    sums: Callable[[Tensor], Tensor] = softmax_sums
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor] = softmax_gradient

    @property
    def tiles(self) -> list[slice]:
        """The rows of the weight, tile by tile."""
        return [slice(i, min(i + TILE_COLUMNS, self.rows)) for i in range(0, self.rows, TILE_COLUMNS)]


def head_logprobs_entropies(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the targets and entropies (nats) of softmax(hidden weight^T / temperature), [R] each.

    Differentiable in both results; float32, or float64 if the inputs are. As with a column-parallel linear layer, the
    gradient of ``hidden_RH`` is the part that comes through this rank's shard (add up over the group), that of
    ``weight_VH`` is complete.

    Args:
        hidden_RH: the last hidden states, equal on every rank of the group; R may be 0.
        weight_VH: this rank's rows of the output layer; rank r of the group holds ids from r * V on.
        targets_R: int64 token ids.
        temperature: divides the logits.
        group: the ranks that share the vocabulary; one all-gather of four floats a token.
        vocab_size: ids from here on are padding, with probability 0; none: no padding.
        backend: see ``Backend``.
    """
    if hidden_RH.dtype != weight_VH.dtype:
        raise ValueError(f"hidden is {hidden_RH.dtype}, weight {weight_VH.dtype}: cast one of them")
    num_rows = len(weight_VH)
    first_id = group_rank(group) * num_rows
    rows = num_rows if vocab_size is None else min(max(vocab_size - first_id, 0), num_rows)
    chosen = choose_backend(backend, weight_VH.device, -(-rows // TILE_COLUMNS))
    if chosen == "plain":
        return _plain(hidden_RH, weight_VH, targets_R, Shard(first_id, rows, temperature, group))
    kernels = _compiled() if chosen == "tiles+compile" else (softmax_sums, softmax_gradient)
    shard = Shard(first_id, rows, temperature, group, *kernels)
    return _HeadLogprobs.apply(hidden_RH, weight_VH, targets_R - first_id, shard)


def choose_backend(backend: Backend, device: torch.device, num_tiles: int) -> Backend:
    """Return what ``auto`` stands for on this device; the others as they are."""
    if backend == "auto" and (asked := os.environ.get(BACKEND_VARIABLE)):
        named = [known for known in BACKENDS if known == asked]
        if not named:
            raise ConfigError(f"{BACKEND_VARIABLE}={asked} is not a backend: write one of {', '.join(BACKENDS)}")
        backend = named[0]
    if backend != "auto":
        return backend
    # One tile is over before the compiler has started.
    return "tiles+compile" if num_tiles > 1 and compiler_found(device.type) else "tiles"


@cache
def compiler_found(device_type: str) -> bool:
    """Return whether torch.compile can build kernels: Triton on a GPU; a C++ compiler and Python's headers on a CPU."""
    if device_type == "cuda":
        return importlib.util.find_spec("triton") is not None
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return headers.exists() and any(shutil.which(name) for name in compilers if name)


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return torch.compile(softmax_sums, dynamic=True), torch.compile(softmax_gradient, dynamic=True)


class _HeadContext(Context, Protocol):
    shard: Shard


class _HeadLogprobs(torch.autograd.Function):
    """The differentiable operation; saves its inputs and two floats a token."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _HeadContext, hidden_RH: Tensor, weight_VH: Tensor, columns_R: Tensor, shard: Shard
    ) -> tuple[Tensor, Tensor]:
        sums_KR = hidden_RH.new_zeros(3, len(hidden_RH), dtype=wide(hidden_RH.dtype))
        sums_KR[0] = torch.finfo(sums_KR.dtype).min / 2
        target_logits_R = torch.full_like(sums_KR[0], -torch.inf)
        for tile in shard.tiles:
            logits_RC = _logits(hidden_RH, weight_VH[tile], shard.temperature)
            target_logits_R = torch.maximum(target_logits_R, pick(logits_RC, columns_R - tile.start))
            sums_KR = merge_sums(torch.stack((sums_KR, shard.sums(logits_RC))))
        logprobs_R, entropies_R, normalizers_R = finish(sums_KR, target_logits_R, shard.group)
        ctx.save_for_backward(hidden_RH, weight_VH, columns_R, torch.stack((normalizers_R, entropies_R)))
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return logprobs_R, entropies_R

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _HeadContext, u_R: Tensor | None, v_R: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_RH, weight_VH, columns_R, saved_2R = ctx.saved_tensors
        shard = ctx.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden_RH, dtype=saved_2R.dtype) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight_VH) if wants_weight else None
        u_R = None if u_R is None else u_R / shard.temperature
        v_R = None if v_R is None else v_R / shard.temperature
        for tile in shard.tiles:
            logits_RC = _logits(hidden_RH, weight_VH[tile], shard.temperature)
            slopes_RC = shard.gradient(logits_RC, columns_R - tile.start, saved_2R, u_R, v_R).to(hidden_RH.dtype)
            if hidden_gradient is not None:
                hidden_gradient += _product(slopes_RC, weight_VH[tile])
            if weight_gradient is not None:
                torch.mm(slopes_RC.T, hidden_RH, out=weight_gradient[tile])
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden_RH.dtype)
        return hidden_gradient, weight_gradient, None, None


def _logits(hidden_RH: Tensor, tile_CH: Tensor, temperature: float) -> Tensor:
    """Return the scaled logits of one tile, [R, C], in at least float32."""
    if hidden_RH.is_cuda:
        logits_RC = _product(hidden_RH, tile_CH.T)
    else:
        logits_RC = hidden_RH.to(wide(hidden_RH.dtype)) @ tile_CH.to(wide(tile_CH.dtype)).T
    return logits_RC if temperature == 1.0 else logits_RC.mul_(1 / temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right; on a GPU 16-bit inputs give a float32 result, elsewhere one of their own type."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _plain(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return the same from all logits at once."""
    dtype = wide(hidden_RH.dtype)
    logits_RV = hidden_RH.to(dtype) @ weight_VH.to(dtype).T
    padding_V = torch.arange(len(weight_VH), device=weight_VH.device) >= shard.rows
    logits_RV = logits_RV.masked_fill(padding_V, -torch.inf)
    return vocab_logprobs_entropies(logits_RV, targets_R, temperature=shard.temperature, group=shard.group)
