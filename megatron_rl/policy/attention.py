"""Causal attention over the sequences of a packed row.

Legend: T tokens of this rank's part of a row, N heads, G key and value heads, D head dimension, B sequences of a
bucket, S their longest.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rl.policy.paths import paths_for
from megatron_rl.policy.rows import Bucket, PackedRow

LARGEST_HEAD = 256
"""Of torch's kernel for sequences of different lengths; it takes multiples of 8."""


class PackedAttention(nn.Module):
    """Causal attention over packed sequences: by torch's variable-length kernel, or on buckets of similar length.

    Stands where megatron's DotProductAttention stands; that one takes neither packed rows nor context parallelism. With
    context parallelism keys and values are gathered, so each rank attends from its zig-zag chunks to whole sequences.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale
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
        if self.context_group.size() == 1 and packed_seq_params.num_tokens and can_vary(query):
            return varying(query, key, value, packed_seq_params, self.scale).reshape(shape)
        if self.context_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.context_group)
            value = gather_from_sequence_parallel_region(value, group=self.context_group)
        return in_buckets(query, key, value, packed_seq_params, self.scale).reshape(shape)


def can_vary(query: Tensor) -> bool:
    """Return whether torch's variable-length kernel takes tensors like this one."""
    width = query.shape[-1]
    return width <= LARGEST_HEAD and width % 8 == 0 and paths_for(query.dtype, query.device.type).varlen


def varying(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float | None) -> Tensor:
    """Return what torch's variable-length kernel gives, [T, N, D]; zeros in the filler at the end of the row.

    The kernel wants heads of one width; latent attention's values are narrower than its keys, and are padded.
    """
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that the rest runs on

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


def in_buckets(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float | None) -> Tensor:
    """Return what torch's scaled dot product gives on each bucket, [T, N, D]; zeros at padding positions."""
    outputs = [_attend(query, key, value, bucket, scale) for bucket in row.buckets]
    nothing_1ND = query.new_zeros(1, query.shape[1], value.shape[-1])
    if not outputs:
        # An empty row must still run backward: every rank of a data- or expert-parallel group waits for it.
        nothing_1ND = nothing_1ND + 0 * (query.sum() + key.sum() + value.sum())
    return torch.cat([*outputs, nothing_1ND])[row.output_index_T]


def _attend(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, bucket):
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    attended_BNSD = F.scaled_dot_product_attention(
        query[bucket.query_index_BS].transpose(1, 2),
        key[bucket.key_index_BS].transpose(1, 2),
        value[bucket.key_index_BS].transpose(1, 2),
        attn_mask=bucket.mask_B1SS,
        is_causal=bucket.mask_B1SS is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return attended_BNSD.transpose(1, 2).flatten(0, 1)


def _takes_groups(query: Tensor, bucket: Bucket) -> bool:
    """Return whether heads may share keys without falling back to a product that holds all scores.

    A CPU's kernel takes them; of a GPU's only the flash one surely does, which wants 16 bits and no mask.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" or (half and bucket.mask_B1SS is None)
