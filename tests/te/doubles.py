"""Stand-ins for CUDA and for transformer-engine's kernels, so that its layer spec is built and run on a CPU.

transformer-engine's classes are the real ones: constructors, parameters, shards, attributes for gradient reduction, and
megatron-core's wrappers around them. ``install`` replaces what needs a GPU:

=============================================== ============================================================
replaced                                        by
=============================================== ============================================================
torch.cuda.is_available, device_count           True, 1
torch.cuda.get_device_capability, _properties   those of an H100
torch.cuda.Stream                               a stream on which all work is synchronous
te.Linear.forward                               torch's product; megatron-core's tensor-parallel collectives
te.LayerNormLinear.forward                      torch's RMSNorm, then as te.Linear
te.GroupedLinear.forward                        one product per expert
te.RMSNorm.forward                              torch's RMSNorm
te.DotProductAttention.forward                  softmax of all scores, one sequence at a time
fused_apply_rotary_pos_emb_thd                  megatron-core's unfused rotation, one sequence at a time
te_general_gemm (router)                        torch's product in the output's dtype
fused_permute_with_probs, fused_unpermute       indexing and index_add
fused_sort_chunks_by_index (and _with_probs)    split and concatenate
=============================================== ============================================================

Every call is bound to the signature of what it replaces: an argument that transformer-engine does not have fails.
Stand-ins prove nothing about kernels, the choice of an attention kernel, transformer-engine's autograd functions and
collectives, FP8, its fused Adam (built, never stepped) and streams.

Legend: T tokens of a rank's row, W tokens of a row on all context-parallel ranks, N heads, D head size, E experts.
"""

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from megatron_rl.distributed import cpu
from megatron_rl.policy import model
from megatron_rl.policy.backends import Backends
from megatron_rl.policy.rows import zigzag

ENGINE = Backends(engine=True, varlen=False, grouped=False, fused=False, accumulates=False)
"""transformer-engine for everything that it has; apex and compiled functions need a GPU."""


class NoStream(torch.cpu.Stream):
    """A stream on which all work is synchronous."""


def install() -> None:
    """Replace the symbols of the table in this process, and let the policy choose transformer-engine."""
    cpu.activate()  # refuses a machine with CUDA, so it precedes the next line
    stand_in_for_cuda()
    setattr(model, "backends_for", lambda dtype, device_type: ENGINE)  # noqa: B010
    for kind, forward in (
        (te.Linear, linear),
        (te.LayerNormLinear, norm_linear),
        (te.GroupedLinear, grouped_linear),
        (te.RMSNorm, rms_norm),
        (te.DotProductAttention, attention),
    ):
        setattr(kind, "forward", with_signature_of(kind.forward, forward))  # noqa: B010
    replace_function(rope_utils, fused_apply_rotary_pos_emb_thd)
    for function in (
        te_general_gemm,
        fused_permute_with_probs,
        fused_unpermute,
        fused_sort_chunks_by_index_with_probs,
        fused_sort_chunks_by_index,
    ):
        replace_function(moe_utils, function)


def stand_in_for_cuda() -> None:
    """Answer transformer-engine's questions about the device as an H100 does."""
    h100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (h100.major, h100.minor),
        "get_device_properties": lambda device=None: h100,
        "Stream": NoStream,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def with_signature_of(original: Callable[..., object], double: Callable[..., object]) -> Callable[..., object]:
    """Return the double, called with the arguments of the original by name, its defaults filled in."""
    signature = inspect.signature(original)

    def call(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return double(**bound.arguments)

    return call


def replace_function(module: ModuleType, double: Callable[..., object]) -> None:
    """Replace the function of the same name in the module."""
    if (original := getattr(module, double.__name__, None)) is not None:  # 0.16 has no te_general_gemm before repair
        setattr(module, double.__name__, with_signature_of(original, double))


def linear(self: te.Linear, inp: Tensor, **_: object) -> Tensor | tuple[Tensor, Tensor | None]:
    """Return inp weight^T (+ bias), gathered before or reduced after the product as ``parallel_mode`` says."""
    weight = self.weight if hasattr(self, "weight") else torch.cat([getattr(self, name) for name in self.weight_names])
    bias = self.bias if self.use_bias and self.bias.numel() else None
    sharded = self.tp_size > 1
    if self.parallel_mode == "column" and sharded:
        enter = (
            tensor_parallel.gather_from_sequence_parallel_region
            if self.sequence_parallel
            else tensor_parallel.copy_to_tensor_model_parallel_region
        )
        inp = enter(inp, group=self.tp_group)
    output = F.linear(inp, weight)
    if self.parallel_mode == "row" and sharded:
        leave = (
            tensor_parallel.reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else tensor_parallel.reduce_from_tensor_model_parallel_region
        )
        output = leave(output, group=self.tp_group)
    if bias is not None and self.apply_bias:
        output = output + bias
    return (output, bias) if self.return_bias else output


def norm_linear(self: te.LayerNormLinear, inp: Tensor, **options: object) -> Tensor | tuple[Tensor, Tensor | None]:
    """Return the product with the normalized input."""
    assert self.normalization == "RMSNorm"
    assert not self.zero_centered_gamma
    assert not self.return_layernorm_output
    return linear(self, F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps), **options)


def grouped_linear(
    self: te.GroupedLinear, inp: Tensor, m_splits: list[int], out: Tensor | None, **_: object
) -> Tensor | tuple[Tensor, list[Tensor | None]]:
    """Return each expert's product with its rows. Experts are replicated here; the dispatcher exchanges tokens."""
    assert out is None
    assert self.parallel_mode is None or self.tp_size == 1
    weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
    biases = [getattr(self, f"bias{index}") if self.use_bias else None for index in range(self.num_gemms)]
    parts = inp.split([int(size) for size in m_splits])
    output = torch.cat(
        [
            F.linear(part, weight, bias if self.apply_bias else None)
            for part, weight, bias in zip(parts, weights, biases, strict=True)
        ]
    )
    return (output, biases) if self.return_bias else output


def rms_norm(self: te.RMSNorm, input: Tensor, **_: object) -> Tensor:
    """Return torch's RMSNorm of the last dimension."""
    assert not self.zero_centered_gamma
    return F.rms_norm(input, (input.shape[-1],), self.weight, self.eps)


def attention(
    self: te.DotProductAttention,
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor,
    qkv_format: str,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    attn_mask_type: str,
    window_size: tuple[int, int] | None,
    **_: object,
) -> Tensor:
    """Return [T, N D]: causal attention within each sequence, with sliding windows and learned sinks."""
    assert qkv_format == "thd", qkv_format
    assert attn_mask_type == "padding_causal", attn_mask_type
    assert cu_seqlens_q.dtype == torch.int32
    assert isinstance(max_seqlen_q, int)
    lengths = cu_seqlens_q.diff().long()
    assert max_seqlen_q >= int(lengths.max())
    group = self.cp_group
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    assert int(lengths.sum()) == len(query_layer) * size, (cu_seqlens_q, query_layer.shape)
    positions_T = zigzag(lengths, rank, size)
    keys_WND, values_WND = key_layer, value_layer
    if size > 1:
        order_W = torch.cat([zigzag(lengths, other, size) for other in range(size)]).argsort()
        keys_WND = torch.cat(all_gather(key_layer.contiguous(), group=group))[order_W]
        values_WND = torch.cat(all_gather(value_layer.contiguous(), group=group))[order_W]
    window = (window_size or self.window_size or (-1, -1))[0]
    scale = self.softmax_scale if self.softmax_scale is not None else query_layer.shape[-1] ** -0.5
    sinks_N = self.softmax_offset.view(-1) if self.softmax_type == "learnable" else None
    outputs = []
    local_starts = (cu_seqlens_q // size).tolist()
    for number, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        local = slice(local_starts[number], local_starts[number + 1])
        attended = one_sequence(
            query_layer[local],
            keys_WND[start:end],
            values_WND[start:end],
            positions_T[local] - start,
            scale=scale,
            window=window,
            sinks_N=sinks_N,
        )
        outputs.append(attended)
    return torch.cat(outputs).flatten(1)


def one_sequence(
    query_TND: Tensor,
    keys_WGD: Tensor,
    values_WGD: Tensor,
    positions_T: Tensor,
    *,
    scale: float,
    window: int,
    sinks_N: Tensor | None,
) -> Tensor:
    """Return [T, N, D] for queries at these positions of one sequence; ``window`` < 0: no limit."""
    repeats = query_TND.shape[1] // keys_WGD.shape[1]
    keys_NWD = keys_WGD.transpose(0, 1).repeat_interleave(repeats, 0)
    values_NWD = values_WGD.transpose(0, 1).repeat_interleave(repeats, 0)
    scores_NTW = query_TND.transpose(0, 1) @ keys_NWD.transpose(1, 2) * scale
    distance_TW = positions_T[:, None] - torch.arange(len(keys_WGD))
    hidden_TW = (distance_TW < 0) | ((distance_TW > window) if window >= 0 else False)
    scores_NTW = scores_NTW.masked_fill(hidden_TW, float("-inf"))
    if sinks_N is not None:
        sinks_NT1 = sinks_N.to(scores_NTW)[:, None, None].expand(-1, len(query_TND), 1)
        scores_NTW = torch.cat([scores_NTW, sinks_NT1], dim=-1)
    shares_NTW = scores_NTW.softmax(-1)[..., : len(keys_WGD)]
    return (shares_NTW @ values_NWD).transpose(0, 1)


def fused_apply_rotary_pos_emb_thd(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int, cp_rank: int, interleaved: bool
) -> Tensor:
    """Return the heads [T, N, D] rotated by their positions within each sequence."""
    lengths = cu_seqlens.diff().long()
    starts = (cu_seqlens[:-1].long()).repeat_interleave(lengths // cp_size)
    angles = freqs[zigzag(lengths, cp_rank, cp_size) - starts]
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], angles, rotary_interleaved=interleaved)[:, 0]


def te_general_gemm(
    A: Tensor,
    B: Tensor,
    out_dtype: torch.dtype | None,
    layout: str,
    bias: Tensor | None,
    **_: object,
) -> list[Tensor]:
    """Return B A^T (TN), B A (NN) or B^T A (NT), as BLAS names them for column-major matrices."""
    dtype = out_dtype or A.dtype
    first = B.to(dtype).T if layout[1] == "T" else B.to(dtype)
    second = A.to(dtype).T if layout[0] == "T" else A.to(dtype)
    return [first @ second if bias is None else first @ second + bias.to(dtype)]


def fused_permute_with_probs(inp: Tensor, probs: Tensor, routing_map: Tensor, **_: object) -> tuple[Tensor, ...]:
    """Return the tokens of expert 0, then of expert 1, ...; their probabilities; their indices in ``inp``."""
    map_ET = routing_map.bool().T.contiguous()
    order = torch.arange(len(inp)).expand(len(map_ET), -1).masked_select(map_ET)
    return inp[order], probs.T.contiguous().masked_select(map_ET), order


def fused_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None, restore_shape: torch.Size, **_: object
) -> Tensor:
    """Return the sum of each token's expert outputs; ``row_id_map`` is from the stand-in of the permutation."""
    assert merging_probs is None
    return torch.zeros(restore_shape, dtype=inp.dtype).index_add(0, row_id_map, inp)


def fused_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the chunks of rows, and of their probabilities, in the given order."""
    return (
        fused_sort_chunks_by_index(inp, split_sizes, sorted_index),
        fused_sort_chunks_by_index(probs, split_sizes, sorted_index),
    )


def fused_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Return the chunks of rows in the given order."""
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[index] for index in sorted_index.tolist()])
