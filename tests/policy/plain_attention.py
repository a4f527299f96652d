"""Causal attention written out, and a stand-in for torch's variable-length kernel, which runs on GPUs only."""

import torch
from torch import Tensor


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    *,
    window: int | None = None,
    sinks_A: Tensor | None = None,
) -> Tensor:
    """Attend within one sequence: query [T, N, D], key [T, G, D], value [T, G, E] -> [T, N, E]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("tnd,snd->nts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    earlier = torch.ones_like(later).tril(-(window or len(query)))
    scores = scores.masked_fill(later | earlier, -torch.inf)
    if sinks_A is not None:
        scores = torch.cat([scores, sinks_A[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("nts,sne->tne", scores.softmax(-1)[..., : len(query)], value)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Do what ``torch.nn.attention.varlen.varlen_attn`` documents for these arguments."""
    assert window_size == (-1, 0), "causal"
    assert cu_seq_k is not None
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    assert int(cu_seq_q[-1]) == len(query) == len(key) == len(value)
    lengths = cu_seq_q.diff().tolist()
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([causal(q, k, v, scale) for q, k, v in parts])
