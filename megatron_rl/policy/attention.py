"""Causal attention over the sequences of a packed row.

Legend: T tokens of this rank's part of a row, A attention heads, Q key and value heads, D head size, B sequences of a
bucket, S their maximum length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from megatron_rl.policy.backends import backends_for
from megatron_rl.policy.rows import AttentionBucket, PackedRow

LARGEST_HEAD = 256
"""The largest head size of torch's kernel for sequences of different lengths; sizes must be multiples of 8."""


class PackedAttention(nn.Module):
    """Causal attention over packed sequences, with torch's variable-length kernel or on buckets of similar length.

    Replaces megatron-core's DotProductAttention, which supports neither packed rows nor context parallelism. With
    context parallelism, keys and values are gathered, so that each rank attends from its zigzag chunks to full
    sequences.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1  # megatron-core's window excludes the query token
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            memory = torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.softmax_offset = nn.Parameter(memory)
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Attend. query [T, N, D], key and value [T, G, D] -> [T, N * D]; padding positions give zeros.

        A plain row comes with a dimension of one after T, and leaves with it.
        """
        assert packed_seq_params is not None, "PackedAttention takes packed rows only"
        if packed_seq_params.is_plain:
            query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        shape = (len(query), 1, -1) if packed_seq_params.is_plain else (len(query), -1)
        plain = self.window is None and self.softmax_offset is None
        if plain and self.context_group.size() == 1 and packed_seq_params.num_tokens and supports_varlen(query):
            return varlen_attention(query, key, value, packed_seq_params, self.scale).reshape(shape)
        if self.context_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.context_group)
            value = gather_from_sequence_parallel_region(value, group=self.context_group)
        kind = AttentionOptions(self.scale, self.window, self.softmax_offset)
        return bucketed_attention(query, key, value, packed_seq_params, kind).reshape(shape)


def supports_varlen(query: Tensor) -> bool:
    """Return whether torch's variable-length kernel supports the head dimension, dtype and device of this tensor."""
    width = query.shape[-1]
    return width <= LARGEST_HEAD and width % 8 == 0 and backends_for(query.dtype, query.device.type).varlen


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float | None) -> Tensor:
    """Return what torch's variable-length kernel gives, [T, N, D]; zeros in the filler at the end of the row.

    The kernel requires equal head dimensions; latent attention's values are narrower than its keys and are padded.
    """
    from torch.nn.attention.varlen import varlen_attn  # missing in older versions of torch

    width, tokens, ends = value.shape[-1], row.num_tokens, row.sequence_ends
    assert ends is not None, "rank_row sets it"
    padded = F.pad(value, (0, query.shape[-1] - width))
    attended = varlen_attn(
        query[:tokens].contiguous(),
        key[:tokens].contiguous(),
        padded[:tokens].contiguous(),
        ends,
        ends,
        row.max_seqlen_q,
        row.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor), "no further outputs were asked for"
    return F.pad(attended[..., :width], (0, 0, 0, 0, 0, len(query) - tokens))


@dataclass(frozen=True)
class AttentionOptions:
    """Settings of an attention layer.

    Attributes:
        scale: of the scores; None: one over the root of the head dimension.
        window: how many tokens back a token sees, itself included; None: all.
        sinks_A: a logit of each head that takes its share of the softmax and gives nothing; None: none.
    """

    scale: float | None = None
    window: int | None = None
    sinks_A: Tensor | None = None


def bucketed_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, kind: AttentionOptions) -> Tensor:
    """Return what torch's scaled dot product gives on each bucket, [T, N, D]; zeros at padding positions."""
    outputs = [_attend(query, key, value, bucket, kind) for bucket in row.buckets]
    nothing_1ND = query.new_zeros(1, query.shape[1], value.shape[-1])
    if not outputs:
        # An empty row must run backward too: the other ranks of data- and expert-parallel groups wait for it.
        sinks = 0 if kind.sinks_A is None else kind.sinks_A.sum()
        nothing_1ND = nothing_1ND + 0 * (query.sum() + key.sum() + value.sum() + sinks)
    return torch.cat([*outputs, nothing_1ND])[row.output_index_T]


def _attend(query: Tensor, key: Tensor, value: Tensor, bucket: AttentionBucket, kind: AttentionOptions) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    mask = visible_keys(bucket, kind.window)
    if grouped and not _takes_groups(query, mask):
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    query_BASD = query[bucket.query_index_BS].transpose(1, 2)
    key_BQSD, value_BQSD = (tensor[bucket.key_index_BS].transpose(1, 2) for tensor in (key, value))
    # Kernels that do not hold all scores want equal widths; latent attention's values are narrower than its keys, which
    # megatron-core 0.16 and 0.17 leave so.
    value_BQSD = F.pad(value_BQSD, (0, query.shape[-1] - value.shape[-1]))
    scale = query.shape[-1] ** -0.5 if kind.scale is None else kind.scale
    if kind.sinks_A is not None:
        query_BASD, key_BQSD, value_BQSD = with_sinks(query_BASD, key_BQSD, value_BQSD, kind.sinks_A / scale)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    skipped = 1 if kind.sinks_A is not None and mask is None else 0
    attended_BASD = F.scaled_dot_product_attention(
        # In causal order, the sink is the first key and needs a query before the others.
        F.pad(query_BASD, (0, 0, skipped, 0)) if skipped else query_BASD,
        key_BQSD,
        value_BQSD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return attended_BASD[:, :, skipped:, : value.shape[-1]].transpose(1, 2).flatten(0, 1)


def visible_keys(bucket: AttentionBucket, window: int | None) -> Tensor | None:
    """Return the mask of visible keys per query; None: causal, without a window."""
    longest = bucket.key_index_BS.shape[1]
    if window is None or longest <= window:
        return bucket.mask_B1SS
    place_S = torch.arange(longest, device=bucket.key_index_BS.device)
    mask = place_S <= place_S[:, None] if bucket.mask_B1SS is None else bucket.mask_B1SS
    return mask & (place_S > mask.sum(-1, keepdim=True) - 1 - window)


def with_sinks(
    query_BASD: Tensor, key_BQSD: Tensor, value_BQSD: Tensor, logits_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put a key without value before the others, whose product with a query of head n is ``logits_A[n]``.

    Extra features distinguish the heads that share keys: head n's queries have a 1 where the key has its logit.
    Values get as many zeros, because torch's kernels want heads of one width. Gradients are those of the
    softmax with one more logit, by whatever kernel runs.
    """
    groups = key_BQSD.shape[1]
    shared = len(logits_A) // groups
    more = -(-shared // 8) * 8  # kernels on a GPU take multiples of 8
    mine_AD = F.pad(torch.eye(shared, dtype=query_BASD.dtype, device=query_BASD.device), (0, more - shared))
    mine_AD = mine_AD.repeat(groups, 1)
    query = torch.cat([query_BASD, mine_AD[None, :, None].expand(*query_BASD.shape[:3], -1)], dim=-1)
    sink_QD = F.pad(logits_A.to(key_BQSD.dtype).view(groups, shared), (key_BQSD.shape[-1], more - shared))
    sink_keys = sink_QD[None, :, None].expand(len(key_BQSD), -1, -1, -1)
    return query, torch.cat([sink_keys, F.pad(key_BQSD, (0, more))], dim=2), F.pad(value_BQSD, (0, more, 1, 0))


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Return whether heads may share keys without falling back to a product that holds all scores.

    A CPU's kernel takes them; of a GPU's only the flash one surely does, which wants 16 bits and no mask.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" or (half and mask is None)
