"""Reference implementations, in torch, of cuDNN's fused attention and of the kernels for context parallelism.

``FUNCTIONS`` lists them under their names in ``transformer_engine_torch``. Attention knows packed rows (THD), causal
and padding masks, sliding windows and learned sinks; everything else is refused by assertions. It returns, as cuDNN
does, the log of each query's sum of exponentials, from which the backward pass recomputes the shares.

Legend: T tokens of the queries, W of the keys, N heads, G key heads, D head size, S sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import transformer_engine_torch as tex
from torch import Tensor

from megatron_rl.policy.rows import zigzag
from tests.te.kernels import wide


def get_fused_attn_backend(fused_attn_params: object) -> tuple[object, str]:
    """Return cuDNN's backend for sequences of any length, as on an H100 for head sizes up to 256."""
    return tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def sequences(cu_seqlens: Tensor, padded: Tensor | None) -> list[slice]:
    """Return the place of each sequence among the tokens."""
    starts = (cu_seqlens if padded is None else padded)[:-1].tolist()
    return [slice(start, start + length) for start, length in zip(starts, cu_seqlens.diff().tolist(), strict=True)]


def masked_scores(
    query_TND: Tensor, key_WGD: Tensor, scale: float, mask_type: str, window: tuple[int, int], bottom_right: bool
) -> Tensor:
    """Return [N, T, W], -inf where a query does not attend to a key."""
    key_WND = wide(key_WGD).repeat_interleave(query_TND.shape[1] // key_WGD.shape[1], 1)
    scores_NTW = torch.einsum("tnd,wnd->ntw", wide(query_TND), key_WND) * scale
    queries, keys = len(query_TND), len(key_WGD)
    offset = keys - queries if bottom_right else 0
    distance_TW = torch.arange(queries)[:, None] + offset - torch.arange(keys)
    hidden_TW = torch.zeros_like(distance_TW, dtype=torch.bool)
    if "CAUSAL" in mask_type:
        hidden_TW |= distance_TW < 0
    left, right = window
    if left >= 0:
        hidden_TW |= distance_TW > left
    if right >= 0:
        hidden_TW |= -distance_TW > right
    return scores_NTW.masked_fill(hidden_TW, float("-inf"))


def check(dropout: float, layout: object, bias_type: object, *quantizers: object) -> None:
    """Refuse what these implementations lack."""
    assert dropout == 0.0
    assert layout == tex.NVTE_QKV_Layout.NVTE_THD_THD_THD, layout
    assert bias_type == tex.NVTE_Bias_Type.NVTE_NO_BIAS, bias_type
    assert all(quantizer is None for quantizer in quantizers)


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: object,
    o_format: object,
    qkv_scale_inv_format: object,
    bias_type: object,
    attn_mask_type: object,
    softmax_type: object,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: object,
    o_quantizer: object,
    Bias: Tensor | None,
    SoftmaxOffset: Tensor | None,
    rng_gen: object,
    rng_elts_per_thread: int,
    return_max_logit: bool,
    cuda_graph: bool,
) -> list[Tensor]:
    """Return [output [T, N, D], log-sums [T, N, 1] in float32, state of a generator(, sinks)]."""
    check(p_dropout, qkv_layout, bias_type, s_quantizer, o_quantizer, Bias, page_table_k, page_table_v)
    assert not return_max_logit
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    assert max_seqlen_kv >= int(cu_seqlens_kv.diff().max())
    output = Q.new_zeros(*Q.shape[:-1], V.shape[-1])
    log_sums = torch.zeros(*Q.shape[:-1], 1, dtype=wide(Q).dtype)
    queries, keys = sequences(cu_seqlens_q, cu_seqlens_q_padded), sequences(cu_seqlens_kv, cu_seqlens_kv_padded)
    for query, key in zip(queries, keys, strict=True):
        scores_NTW = masked_scores(
            Q[query], K[key], attn_scale, str(attn_mask_type), (window_size[0], window_size[1]), bottom_right_diagonal
        )
        log_NT = scores_NTW.logsumexp(-1)
        if SoftmaxOffset is not None:
            log_NT = torch.logaddexp(log_NT, wide(SoftmaxOffset).view(-1, 1))
        shares_NTW = (scores_NTW - log_NT[..., None]).exp()
        values_WND = wide(V[key]).repeat_interleave(Q.shape[1] // V.shape[1], 1)
        output[query] = torch.einsum("ntw,wnd->tnd", shares_NTW, values_WND).to(Q.dtype)
        log_sums[query] = log_NT.T[..., None]
    rng_state = torch.zeros(2, dtype=torch.int64)
    return [output, log_sums, rng_state, *([] if SoftmaxOffset is None else [SoftmaxOffset])]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: object,
    o_format: object,
    do_format: object,
    dqkv_layout: object,
    qkv_scale_inv_format: object,
    do_scale_inv_format: object,
    bias_type: object,
    attn_mask_type: object,
    softmax_type: object,
    window_size: Sequence[int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,  # noqa: E741 (the kernel's name)
    dO: Tensor,
    fake_dtype: torch.dtype,
    Aux_CTX_Tensors: Sequence[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    s_quantizer: object,
    dp_quantizer: object,
    dqkv_quantizer: object,
    cuda_graph: bool,
) -> list[Tensor | None]:
    """Return the gradients [of queries, keys, values, None, of sinks]."""
    check(p_dropout, qkv_layout, bias_type, s_quantizer, dp_quantizer, dqkv_quantizer)
    log_sums, sinks = Aux_CTX_Tensors[0], Aux_CTX_Tensors[2] if len(Aux_CTX_Tensors) > 2 else None
    assert log_sums.shape == (*Q.shape[:-1], 1), log_sums.shape
    gradients = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    sink_gradient = None if sinks is None else torch.zeros_like(sinks, dtype=wide(Q).dtype)
    repeats = Q.shape[1] // K.shape[1]
    queries, keys = sequences(cu_seqlens_q, cu_seqlens_q_padded), sequences(cu_seqlens_kv, cu_seqlens_kv_padded)
    for query, key in zip(queries, keys, strict=True):
        scores_NTW = masked_scores(
            Q[query], K[key], attn_scale, str(attn_mask_type), (window_size[0], window_size[1]), bottom_right_diagonal
        )
        log_NT = log_sums[query, :, 0].T
        shares_NTW = (scores_NTW - log_NT[..., None]).exp()
        above_TND = wide(dO[query])
        inner_NT = (above_TND * wide(O[query])).sum(-1).T
        values_WND = wide(V[key]).repeat_interleave(repeats, 1)
        below_NTW = shares_NTW * (torch.einsum("tnd,wnd->ntw", above_TND, values_WND) - inner_NT[..., None])
        keys_WND = wide(K[key]).repeat_interleave(repeats, 1)
        dk_WND = torch.einsum("ntw,tnd->wnd", below_NTW, wide(Q[query])) * attn_scale
        dv_WND = torch.einsum("ntw,tnd->wnd", shares_NTW, above_TND)
        gradients[0][query] = (torch.einsum("ntw,wnd->tnd", below_NTW, keys_WND) * attn_scale).to(Q.dtype)
        gradients[1][key] = dk_WND.unflatten(1, (-1, repeats)).sum(2).to(K.dtype)
        gradients[2][key] = dv_WND.unflatten(1, (-1, repeats)).sum(2).to(V.dtype)
        if sinks is not None and sink_gradient is not None:
            share_NT = (wide(sinks).view(-1, 1) - log_NT).exp()
            sink_gradient -= (share_NT * inner_NT).sum(-1).view_as(sink_gradient)
    return [*gradients, None, sink_gradient]


def halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of the first and of the second halves of all sequences."""
    chunks = [torch.arange(start, end) for start, end in pairwise(cu_seqlens.tolist())]
    pairs = [chunk.chunk(2) for chunk in chunks if len(chunk)]
    return torch.cat([first for first, _ in pairs]), torch.cat([second for _, second in pairs])


def local(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the sequence ends on a rank with this many tokens, from those of the whole row or of this rank."""
    total = int(cu_seqlens[-1])
    assert total % tokens == 0, (cu_seqlens, tokens)
    return cu_seqlens // (total // tokens)


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """Return the first or second half of each sequence."""
    return tensor[halves(local(cu_seqlens, len(tensor)))[half_idx]]


def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Add the log-sums [N, T / 2] of a step to those of the second halves [N, T]."""
    assert lse_packed
    second = halves(local(cu_seqlens, lse.shape[1]))[1]
    lse[:, second] = torch.logaddexp(lse[:, second], lse_per_step)


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    """Return the log-sums [N, T / 2] of the second halves."""
    assert lse_packed
    second = halves(local(cu_seqlens, lse.shape[1]))[1]
    assert len(second) == second_half_lse_seqlen, (len(second), second_half_lse_seqlen)
    return lse[:, second]


def thd_out_correction(
    out: Tensor,
    out_per_step: Tensor,
    old_lse: Tensor,
    new_lse: Tensor,
    lse_per_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """Weigh the output by old and new log-sums [N, T], and add that of a step."""
    assert lse_packed
    place = halves(local(cu_seqlens, len(out)))[1] if only_second_half else torch.arange(len(out))
    total = new_lse[:, place]
    old = (old_lse[:, place] - total).exp().T[..., None]
    added = (lse_per_step - total).exp().T[..., None]
    out[place] = (wide(out[place]) * old + wide(out_per_step.view(len(place), *out.shape[1:])) * added).to(out.dtype)


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Add, copy or zero the halves of each sequence's gradient. A step with one active half has only that half."""
    places = halves(local(cu_seqlens, len(grad)))
    if "none" in (first_half, second_half) or "zero" in (first_half, second_half):
        steps = (grad_per_step, grad_per_step)
    else:
        steps = (grad_per_step[places[0]], grad_per_step[places[1]])
    for place, step, action in zip(places, steps, (first_half, second_half), strict=True):
        if action == "zero":
            grad[place] = 0
        elif action == "copy":
            grad[place] = step
        elif action == "add":
            grad[place] = grad[place] + step
        else:
            assert action == "none", action


def rank_order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Return the row positions of rank 0, then those of rank 1, ..."""
    lengths = cu_seqlens.diff().long()
    return torch.cat([zigzag(lengths, rank, cp_size) for rank in range(cp_size)])


def thd_sequence_order_to_cp_rank_order(tensor: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int) -> Tensor:
    """Return the tokens of rank 0, then those of rank 1, ..."""
    return tensor[rank_order(cu_seqlens, cp_size)]


def thd_cp_rank_order_to_sequence_order(tensor: Tensor, cu_seqlens: Tensor, cp_size: int, total_tokens: int) -> Tensor:
    """Return the tokens in the order of the row."""
    return tensor[rank_order(cu_seqlens, cp_size).argsort()]


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        get_fused_attn_backend,
        fused_attn_fwd,
        fused_attn_bwd,
        thd_read_half_tensor,
        thd_second_half_lse_correction,
        thd_read_second_half_lse,
        thd_out_correction,
        thd_grad_correction,
        thd_sequence_order_to_cp_rank_order,
        thd_cp_rank_order_to_sequence_order,
    )
}
