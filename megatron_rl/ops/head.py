"""The fused LM head: log-probabilities and entropies from hidden states, without materializing the logits.

Legend: R trained tokens, H hidden size, V entries of this rank's vocabulary shard, C columns of a tile, A = H +
``SHIFT_COLUMNS``, Q ids of a token's sampling mask.

Logits exist one tile at a time and are recomputed in the backward pass; two floats per token are saved. Sums are in
float32 or float64. The cost is four matrix products of 2 R H V operations each:

* forward: logits from 16-bit inputs with a float32 result (ops/products.py);
* backward: log p, in the inputs' dtype. A logit of 30 rounded to bfloat16 would have an error of 0.06, and its
  probability an error of 6 %. Therefore the product computes log p = z - normalizer before rounding: hidden has two
  additional columns with the negative normalizer, as a sum of two bfloat16, and the weight has ones there. The relative
  error of a probability is then 2^-9 |log p|;
* backward: the gradients of hidden (accumulated in float32 over tiles) and of the weight (written once per tile).
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.distributed.collectives import RankGroup, group_rank
from megatron_rl.errors import ConfigError
from megatron_rl.ops.products import WideProducts, brgemm_found
from megatron_rl.ops.tiles import TilePasses, UpstreamGradients, compiled_passes, compiler_found, eager_passes
from megatron_rl.ops.vocab import AutogradContext, finish, merge_sums, pick, vocab_logprobs_entropies, wide

Backend = Literal["auto", "plain", "tiles", "tiles+compile", "tiles+triton"]
"""``plain`` materializes all logits (the reference); ``tiles`` runs eagerly; ``tiles+compile`` fuses the element-wise
passes with torch.compile; ``tiles+triton`` uses Triton kernels. ``auto`` is ``tiles+compile`` if a compiler is found
and there is more than one tile, else ``tiles``."""

BACKENDS: dict[Backend, str] = {
    "auto": "chosen automatically",
    "plain": "plain",
    "tiles": "tiles, eager",
    "tiles+compile": "tiles, compiled",
    "tiles+triton": "tiles, Triton kernels",
}

BACKEND_VARIABLE = "MEGATRON_RL_HEAD"
"""Environment variable that overrides ``auto``."""

TILE_COLUMNS = {"cpu": 8192, "cuda": 16384}
"""Columns per tile by device type: large enough for full speed of the products, small enough to save memory."""

SHIFT_COLUMNS = 8
"""Columns added to hidden and weight to subtract the normalizer: two are used, eight keep rows aligned to 16 bytes."""


@dataclass(frozen=True)
class VocabShard:
    """A rank's shard of the vocabulary and the settings of the operation.

    Attributes:
        first_id: token id of the first row of this rank's weight.
        rows: rows that are vocabulary entries; later rows are padding.
        temperature: divides the logits.
        group: the ranks that shard the vocabulary.
        columns: maximum number of columns per tile.
        passes: the element-wise passes.
        shifted: recompute 16-bit logits minus the normalizer in 16 bits; otherwise recompute them in float32.
    """

    first_id: int
    rows: int
    temperature: float
    group: RankGroup
    columns: int
    passes: TilePasses
    shifted: bool = True

    @property
    def tiles(self) -> list[slice]:
        """Slices of the weight's rows, nearly equal in width so that one compiled kernel serves all."""
        num_tiles = -(-self.rows // self.columns)
        width = min(self.columns, -(-self.rows // max(num_tiles, 1) // 8) * 8)
        return [slice(i, min(i + width, self.rows)) for i in range(0, self.rows, max(width, 1))]


def head_logprobs_entropies(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    group: RankGroup = None,
    vocab_size: int | None = None,
    mask_ids_RQ: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the targets and entropies (nats) of softmax(hidden weight^T / temperature), [R] each.

    Both results are differentiable, in float32 (float64 for float64 inputs). As with a column-parallel linear layer,
    the gradient of ``hidden_RH`` is this rank's contribution, to be summed over the group; that of ``weight_VH`` is
    complete.

    Args:
        hidden_RH: last hidden states, equal on every rank of the group; R may be 0.
        weight_VH: this rank's rows of the output layer; rank r of the group holds ids r * V to (r + 1) * V - 1.
        targets_R: int64 token ids.
        temperature: divides the logits.
        group: the ranks that shard the vocabulary. Communication is one all-gather of four floats per token.
        vocab_size: ids from ``vocab_size`` on are padding, with probability 0; None: no padding.
        mask_ids_RQ: integer ids that a token was sampled from, filled up with -1: all others have probability 0. A
            row of -1 is not restricted, and a target is never excluded. None: no token is restricted.
        backend: implementation, see ``Backend``.

    Raises:
        ValueError: hidden and weight have different dtypes.
        ConfigError: the backend is unknown or not installed.
    """
    if hidden_RH.dtype != weight_VH.dtype:
        raise ValueError(f"hidden is {hidden_RH.dtype}, weight is {weight_VH.dtype}: cast one of them")
    num_rows, columns = len(weight_VH), TILE_COLUMNS[weight_VH.device.type]
    first_id = group_rank(group) * num_rows
    rows = num_rows if vocab_size is None else min(max(vocab_size - first_id, 0), num_rows)
    chosen = choose_backend(backend, weight_VH.device.type, -(-rows // columns))
    passes = _passes(chosen, weight_VH.device.type)
    shard = VocabShard(first_id, rows, temperature, group, columns, passes)
    mask = None if mask_ids_RQ is None else SamplingMask.of(mask_ids_RQ, targets_R, first_id)
    if chosen == "plain":
        return _plain(hidden_RH, weight_VH, targets_R, shard, mask)
    return HeadLogprobs.apply(hidden_RH, weight_VH, targets_R, shard, mask)


@dataclass(frozen=True)
class SamplingMask:
    """The columns of this rank's shard that each token was sampled from.

    Attributes:
        columns_RQ: int64 columns of the shard; may be outside of it.
        all_R: bool, True where a token is not restricted.
    """

    columns_RQ: Tensor
    all_R: Tensor

    @classmethod
    def of(cls, mask_ids_RQ: Tensor, targets_R: Tensor, first_id: int) -> "SamplingMask":
        """Return the mask of the ids ``mask_ids_RQ``, padded with -1, and of the targets."""
        ids_RQ = torch.cat((mask_ids_RQ.long(), targets_R[:, None]), dim=1)
        return cls(torch.where(ids_RQ < 0, -1, ids_RQ - first_id), (mask_ids_RQ < 0).all(1))

    def apply(self, logits_RC: Tensor, start: int) -> Tensor:
        """Set the excluded logits of the tile that begins at column ``start`` to -inf, in place; return the tile."""
        width = logits_RC.shape[1]
        columns_RQ = self.columns_RQ - start
        outside_RQ = (columns_RQ < 0) | (columns_RQ >= width) | (self.columns_RQ < 0)
        excluded_RC = torch.ones(len(logits_RC), width + 1, dtype=torch.bool, device=logits_RC.device)
        excluded_RC.scatter_(1, torch.where(outside_RQ, width, columns_RQ), False)
        return logits_RC.masked_fill_(excluded_RC[:, :width] & ~self.all_R[:, None], -torch.inf)


def choose_backend(backend: Backend, device_type: str, num_tiles: int) -> Backend:
    """Return the backend that ``auto`` selects for this device type; other values are returned unchanged.

    Raises:
        ConfigError: the environment variable has an unknown value.
    """
    if backend == "auto" and (value := os.environ.get(BACKEND_VARIABLE)):
        known = [name for name in BACKENDS if name == value]
        if not known:
            raise ConfigError(f"{BACKEND_VARIABLE}={value} is not a backend: write one of {', '.join(BACKENDS)}")
        backend = known[0]
    if backend != "auto":
        return backend
    # A single tile takes less time than compilation.
    return "tiles+compile" if num_tiles > 1 and compiler_found(device_type) else "tiles"


def _passes(backend: Backend, device_type: str) -> TilePasses:
    if backend == "tiles+triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("the backend tiles+triton needs the package triton, which is not installed; write tiles")
        from megatron_rl.ops.kernels import kernel_passes  # imports triton

        return kernel_passes()
    return compiled_passes(device_type) if backend == "tiles+compile" else eager_passes()


def describe_backend(device_type: str) -> str:
    """Return a description of the backend that ``auto`` selects for more than one tile on this device type."""
    name = BACKENDS[choose_backend("auto", device_type, num_tiles=2)]
    if device_type != "cpu":
        return name
    return f"{name}; bfloat16 products {'by brgemm' if brgemm_found() else 'widened to float32 (twice the time)'}"


class _HeadContext(AutogradContext, Protocol):
    shard: VocabShard
    mask: SamplingMask | None


class HeadLogprobs(torch.autograd.Function):
    """The differentiable operation; saves its inputs and two floats per token."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _HeadContext,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        targets_R: Tensor,
        shard: VocabShard,
        mask: SamplingMask | None,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, [R] each."""
        columns_R = targets_R - shard.first_id
        dtype = wide(hidden_RH.dtype)
        scale = torch.full((), 1 / shard.temperature, dtype=dtype, device=hidden_RH.device)
        products = WideProducts(hidden_RH)
        buffer = hidden_RH.new_empty(len(hidden_RH) * min(shard.columns, shard.rows), dtype=dtype)
        # A rank may hold only padding.
        sums_WSR = [_no_sums(hidden_RH, dtype)]
        target_logits_WR = [torch.full_like(sums_WSR[0][0], -torch.inf)]
        for tile in shard.tiles:
            tile_CH = weight_VH[tile]
            logits_RC = products.into(_part(buffer, len(hidden_RH), len(tile_CH)), tile_CH)
            if mask is not None:
                mask.apply(logits_RC, tile.start)
            target_logits_WR.append(pick(logits_RC, columns_R - tile.start) * scale)
            sums_WSR.append(shard.passes.sums(logits_RC, scale))
        sums_SR, target_logits_R = merge_sums(torch.stack(sums_WSR)), torch.stack(target_logits_WR).amax(0)
        logprobs_R, entropies_R, normalizers_R = finish(sums_SR, target_logits_R, shard.group)
        ctx.save_for_backward(hidden_RH, weight_VH, columns_R, torch.stack((normalizers_R, entropies_R)))
        ctx.shard, ctx.mask = shard, mask
        ctx.set_materialize_grads(False)
        return logprobs_R, entropies_R

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _HeadContext, u_R: Tensor | None, v_R: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of hidden and weight, given those of log-probabilities (u) and entropies (v)."""
        hidden_RH, weight_VH, columns_R, saved_2R = ctx.saved_tensors
        shard = ctx.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        scale = torch.full((), 1 / shard.temperature, dtype=saved_2R.dtype, device=hidden_RH.device)
        again = _RecomputedLogits(hidden_RH, saved_2R[0], shard)
        u_R, v_R = (None if upstream_R is None else upstream_R * scale for upstream_R in (u_R, v_R))
        upstream = UpstreamGradients(torch.stack((again.rest_R, saved_2R[1])), u_R, v_R)
        hidden_gradient = torch.zeros_like(hidden_RH, dtype=saved_2R.dtype) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight_VH) if wants_weight else None
        for tile in shard.tiles:
            logits_RC, slopes_RC = again.logits(weight_VH[tile])
            if ctx.mask is not None:
                ctx.mask.apply(logits_RC, tile.start)
            shard.passes.slopes(slopes_RC, logits_RC, columns_R - tile.start, upstream, scale)
            if hidden_gradient is not None:
                _add_product(hidden_gradient, slopes_RC, weight_VH[tile])
            if weight_gradient is not None:
                torch.mm(slopes_RC.T, hidden_RH, out=weight_gradient[tile])
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden_RH.dtype)
        return hidden_gradient, weight_gradient, None, None, None


class _RecomputedLogits:
    """Recomputes the logits of the backward pass, one tile at a time in the same memory.

    Attributes:
        rest_R: the value to subtract from the scaled logits to get log p.
    """

    def __init__(self, hidden_RH: Tensor, normalizers_R: Tensor, shard: VocabShard) -> None:
        width = min(shard.columns, shard.rows)
        self._slopes = hidden_RH.new_empty(len(hidden_RH) * width)
        narrow = hidden_RH.dtype != normalizers_R.dtype
        self._shifted = (
            _ShiftedLogits(hidden_RH, normalizers_R, shard.temperature, width) if narrow and shard.shifted else None
        )
        self.rest_R = normalizers_R if self._shifted is None else self._shifted.rest_R
        self._products = WideProducts(hidden_RH)
        in_place = self._shifted is not None or not narrow
        self._logits = self._slopes if in_place else torch.empty_like(self._slopes, dtype=self._products.dtype)

    def logits(self, tile_CH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unscaled logits of a tile minus the shift, and the buffer for its slopes."""
        slopes_RC, logits_RC = (
            _part(buffer, len(self.rest_R), len(tile_CH)) for buffer in (self._slopes, self._logits)
        )
        if self._shifted is not None:
            return self._shifted.into(logits_RC, tile_CH), slopes_RC
        return self._products.into(logits_RC, tile_CH), slopes_RC


class _ShiftedLogits:
    """Computes logits minus the normalizer in one 16-bit product; the normalizer is in additional columns of hidden."""

    def __init__(self, hidden_RH: Tensor, normalizers_R: Tensor, temperature: float, columns: int) -> None:
        width_H, dtype = hidden_RH.shape[1], hidden_RH.dtype
        raw_R = normalizers_R * temperature
        shifts_2R = torch.stack((raw_R.to(dtype), (raw_R - raw_R.to(dtype)).to(dtype)))
        self.rest_R = (raw_R - shifts_2R.to(raw_R.dtype).sum(0)) / temperature
        self._left_RA = torch.nn.functional.pad(hidden_RH, (0, SHIFT_COLUMNS))
        self._left_RA[:, width_H : width_H + 2] = -shifts_2R.T
        self._tile_CA = hidden_RH.new_zeros(columns, width_H + SHIFT_COLUMNS)
        self._tile_CA[:, width_H : width_H + 2] = 1

    def into(self, out_RC: Tensor, tile_CH: Tensor) -> Tensor:
        """Write the shifted logits of a tile."""
        right_CA = self._tile_CA[: len(tile_CH)]
        right_CA[:, : tile_CH.shape[1]] = tile_CH
        return torch.mm(self._left_RA, right_CA.T, out=out_RC)


def _part(buffer: Tensor, num_rows: int, columns: int) -> Tensor:
    """Return the front of a one-dimensional buffer as a contiguous [R, C]."""
    return buffer[: num_rows * columns].view(num_rows, columns)


def _no_sums(hidden_RH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (peak, total, tilt) of an empty set of columns, [3, R]."""
    sums_SR = hidden_RH.new_zeros(3, len(hidden_RH), dtype=dtype)
    sums_SR[0] = torch.finfo(dtype).min / 2
    return sums_SR


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``; on a CPU, each product of 16-bit inputs is rounded to 16 bits first."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _plain(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, shard: VocabShard, mask: SamplingMask | None
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, [R] each, from materialized logits."""
    dtype = wide(hidden_RH.dtype)
    logits_RV = hidden_RH.to(dtype) @ weight_VH.to(dtype).T
    padding_V = torch.arange(len(weight_VH), device=weight_VH.device) >= shard.rows
    logits_RV = logits_RV.masked_fill(padding_V, -torch.inf)
    if mask is not None:
        logits_RV = mask.apply(logits_RV, 0)
    return vocab_logprobs_entropies(logits_RV, targets_R, temperature=shard.temperature, group=shard.group)
