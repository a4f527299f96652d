"""Log-probabilities and entropies from vocabulary-parallel logits.

Legend: N tokens, V entries of this rank's vocabulary shard (rank r holds ids r * V to (r + 1) * V - 1), W ranks or
tiles, S statistics per token.

A shard, or a tile of one, is reduced to three statistics per token: peak = max z, total = sum e^(z - peak) and tilt =
sum (z - peak) e^(z - peak), with logits z. Statistics of disjoint parts of the vocabulary merge exactly, and give with
the target's logit z_y

    log p(y) = z_y - peak - log total        H = log total - tilt / total

Backward, with upstream gradients u of the log-probability and v of the entropy, in nats: dz_j = u ([j = y] - p_j) - v
p_j (log p_j + H). Only the normalizer peak + log total and H are saved, two floats per token.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.distributed.collectives import RankGroup, gather_over, group_rank

LOWEST_LOG = -1e4
"""Lower bound of log p, to avoid 0 * inf in p log p; e^-1e4 is exactly 0 in every floating-point type."""

CHUNK_ELEMENTS = 1 << 22
"""Maximum number of logits exponentiated at once, to bound the size of temporaries."""


def vocab_logprobs_entropies(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, group: RankGroup = None
) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature) at the targets, and the entropy of that distribution, in nats.

    Both results are differentiable and have the shape of ``targets``, in float32 (float64 for float64 logits). A logit
    of -inf, such as that of a padding entry of the vocabulary, has probability 0.

    Args:
        logits: [..., V], this rank's shard.
        targets: [...], int64 global ids, equal on every rank of the group.
        temperature: divides the logits.
        group: the ranks that shard the vocabulary. Communication is one all-gather of four floats per token.

    Raises:
        ValueError: the shapes of logits and targets do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {list(logits.shape)} do not match targets {list(targets.shape)}: expected [..., V] and [...]"
        )
    shape = targets.shape
    logprobs, entropies = _VocabLogprobs.apply(logits.flatten(0, -2), targets.flatten(), temperature, group)
    return logprobs.view(shape), entropies.view(shape)


class AutogradContext(Protocol):
    """Attributes of autograd's context that torch's class does not declare."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save tensors for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose zeros (True) or None (False) for the gradient of an unused output."""


class _VocabContext(AutogradContext, Protocol):
    temperature: float


class _VocabLogprobs(torch.autograd.Function):
    """The differentiable operation on [N, V]; saves the logits and two floats per token."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _VocabContext, logits_NV: Tensor, targets_N: Tensor, temperature: float, group: RankGroup
    ) -> tuple[Tensor, Tensor]:
        columns_N = targets_N - group_rank(group) * logits_NV.shape[1]
        parts = []
        for rows in chunks_of_rows(logits_NV):
            chunk = scaled(logits_NV[rows], temperature)
            parts.append(torch.cat((softmax_sums(chunk), pick(chunk, columns_N[rows])[None])))
        sums_SN = torch.cat(parts, 1) if parts else logits_NV.new_zeros(4, 0, dtype=wide(logits_NV.dtype))
        logprobs_N, entropies_N, normalizers_N = finish(sums_SN[:3], sums_SN[3], group)
        ctx.save_for_backward(logits_NV, columns_N, normalizers_N, entropies_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override] - the base takes anything
        ctx: _VocabContext, u_N: Tensor | None, v_N: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_NV, columns_N, normalizers_N, entropies_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for rows in chunks_of_rows(logits_NV):
            gradient_NV[rows] = softmax_gradient(
                scaled(logits_NV[rows], ctx.temperature),
                columns_N[rows],
                torch.stack((normalizers_N[rows], entropies_N[rows])),
                None if u_N is None else u_N[rows] / ctx.temperature,
                None if v_N is None else v_N[rows] / ctx.temperature,
            )
        return gradient_NV, None, None, None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits divided by the temperature, in float32 or float64."""
    logits = logits.to(wide(logits.dtype))
    return logits if temperature == 1.0 else logits / temperature


def softmax_sums(logits_NV: Tensor) -> Tensor:
    """Return (peak, total, tilt) over the last dimension, [3, N]. A row with only -inf has total 0."""
    peak_N = logits_NV.amax(1).clamp(min=torch.finfo(logits_NV.dtype).min / 2)
    shifted_NV = (logits_NV - peak_N[:, None]).clamp_(min=LOWEST_LOG)
    powers_NV = shifted_NV.exp()
    total_N = powers_NV.sum(1)
    return torch.stack((peak_N, total_N, shifted_NV.mul_(powers_NV).sum(1)))


def merge_sums(sums_WSN: Tensor) -> Tensor:
    """Return the (peak, total, tilt), [3, N], of the union of W disjoint parts of the vocabulary, [W, 3, N]."""
    peaks_WN, totals_WN, tilts_WN = sums_WSN.unbind(1)
    peak_N = peaks_WN.amax(0)
    shifts_WN = peaks_WN - peak_N
    factors_WN = shifts_WN.exp()
    tilt_N = (factors_WN * (tilts_WN + shifts_WN.clamp(min=LOWEST_LOG) * totals_WN)).sum(0)
    return torch.stack((peak_N, (factors_WN * totals_WN).sum(0), tilt_N))


def pick(logits_NV: Tensor, columns_N: Tensor) -> Tensor:
    """Return each token's logit at its column, [N]; -inf if the column is outside of the shard or tile."""
    width = logits_NV.shape[1]
    inside_N = (columns_N >= 0) & (columns_N < width)
    picked_N = logits_NV.gather(1, columns_N.clamp(0, width - 1)[:, None])[:, 0]
    return picked_N.masked_fill(~inside_N, -torch.inf)


def finish(sums_SN: Tensor, target_logits_N: Tensor, group: RankGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropies and normalizers, [N] each, from the statistics of all ranks."""
    parts_WSN = gather_over(group, torch.cat((sums_SN, target_logits_N[None])))
    peak_N, total_N, tilt_N = merge_sums(parts_WSN[:, :3])
    log_total_N = total_N.log()
    # Ranks that do not hold the target sent -inf.
    logprobs_N = parts_WSN[:, 3].amax(0) - peak_N - log_total_N
    return logprobs_N, log_total_N - tilt_N / total_N, peak_N + log_total_N


def softmax_gradient(
    logits_NV: Tensor, columns_N: Tensor, saved_2N: Tensor, u_N: Tensor | None, v_N: Tensor | None
) -> Tensor:
    """Return u ([j = y] - p_j) - v p_j (log p_j + H) for the columns of a shard or tile, [N, V].

    Args:
        logits_NV: logits divided by the temperature.
        columns_N: column of the target; may be outside of the shard or tile.
        saved_2N: normalizer and entropy over the full vocabulary.
        u_N: upstream gradient of the log-probability, or None.
        v_N: upstream gradient of the entropy, or None.
    """
    normalizers_N, entropies_N = saved_2N
    logs_NV = (logits_NV - normalizers_N[:, None]).clamp_(min=LOWEST_LOG)
    gradient_NV = logs_NV.exp()
    if v_N is None:
        gradient_NV *= -(torch.zeros_like(entropies_N) if u_N is None else u_N)[:, None]
    else:
        slopes_NV = logs_NV.add_(entropies_N[:, None]).mul_(-v_N[:, None])
        gradient_NV *= slopes_NV if u_N is None else slopes_NV.sub_(u_N[:, None])
    if u_N is None:
        return gradient_NV
    width = logits_NV.shape[1]
    inside_N = (columns_N >= 0) & (columns_N < width)
    return gradient_NV.scatter_add_(
        1, columns_N.clamp(0, width - 1)[:, None], torch.where(inside_N, u_N, 0).to(gradient_NV.dtype)[:, None]
    )


def chunks_of_rows(logits_NV: Tensor) -> list[slice]:
    """Return row slices with at most ``CHUNK_ELEMENTS`` logits each, but at least one row."""
    rows = max(1, CHUNK_ELEMENTS // max(logits_NV.shape[1], 1))
    return [slice(start, start + rows) for start in range(0, len(logits_NV), rows)]
