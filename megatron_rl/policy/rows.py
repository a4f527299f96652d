"""A rank's part of one packed row: tokens, targets, and the layout of sequences for attention.

Legend: W positions of the whole row, T tokens of this context-parallel rank, padding included, R trained tokens among
them, N sequences of the row, B sequences of a bucket, S their maximum length, L layers with experts,
K experts per token, Q ids of a token's sampling mask.
"""

from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.pack import Row
from megatron_rl.data.types import Batch, token_positions, values_at
from megatron_rl.distributed.collectives import group_rank, group_size
from megatron_rl.distributed.mesh import Mesh


@dataclass(frozen=True)
class AttentionBucket:
    """Sequences of similar length that are processed by one batched attention call.

    Attributes:
        query_index_BS: position of each query among this rank's T positions; 0 at padding.
        key_index_BS: position of each key after gathering (ranks concatenated); 0 at padding.
        mask_B1SS: True where a query attends to a key; None: causal (no context parallelism).
    """

    query_index_BS: Tensor
    key_index_BS: Tensor
    mask_B1SS: Tensor | None


@dataclass
class RowRoutes:
    """Experts of the tokens of a row on this rank: recorded ones and those that the routers choose.

    T are the positions that this rank's routers process: with sequence parallelism, a part of the rank's row.

    Attributes:
        token_ids_T: index of each position's token in the batch, -1 at padding.
        record_TLK: recorded experts, to replay or to compare with.
        known_T: where ``record_TLK`` has an entry.
        replays: whether the routers use the recorded experts.
        chosen: place among the L layers -> [T, K] what the router chose by itself; None: not recorded.
    """

    token_ids_T: Tensor
    record_TLK: Tensor
    known_T: Tensor
    replays: bool
    chosen: dict[int, Tensor] | None


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's description of a packed row, extended with the inputs of ``PackedAttention``.

    With ``qkv_format`` "thd", megatron-core applies rotary embeddings per sequence and transformer-engine's attention
    reads the sequence ends. With "sbhd", megatron-core treats a row as one sequence, see ``is_plain``.

    Attributes:
        sequence_ends: int32 cumulative sequence lengths, starting with 0, without the padding at the end of the row.
        num_tokens: tokens in these sequences.
        routes: experts to replay or record; None: none.
        mask_ids_RQ: ids that each trained token was sampled from, -1 as padding; None: tokens are not restricted.
    """

    qkv_format: str = "thd"
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_kv: int = 0
    buckets: list[AttentionBucket] = field(default_factory=list)
    output_index_T: Tensor | None = None
    sequence_ends: Tensor | None = None
    num_tokens: int = 0
    routes: RowRoutes | None = None
    mask_ids_RQ: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether rotary embeddings are applied to the whole row; only ``PackedAttention`` separates sequences."""
        return self.qkv_format == "sbhd"


@dataclass(frozen=True)
class RankRow:
    """A row as input of this rank's part of the model.

    Attributes:
        token_ids_T: index of each position's token in the batch, -1 at padding.
        input_ids_T: token ids, 0 at padding.
        position_ids_T: position within the sequence.
        padding_T: True at padding.
        trained_R: which of the T positions predict a trained token.
        targets_R: the tokens that they predict.
        target_tokens_R: indices of these tokens in the batch.
        loss_inputs: the loss's view of the trained tokens; None where only log-probs are computed.
        packed: the description for attention.
    """

    token_ids_T: Tensor
    input_ids_T: Tensor
    position_ids_T: Tensor
    padding_T: Tensor
    trained_R: Tensor
    targets_R: Tensor
    target_tokens_R: Tensor
    loss_inputs: LossInputs | None
    packed: PackedRow


def rank_row(row: Row, batch: Batch, mesh: Mesh, qkv_format: str = "thd") -> RankRow:
    """Return this rank's zigzag part of a row of the batch, on its device. ``qkv_format``: see ``PackedRow``."""
    size, rank, device = group_size(mesh.context), group_rank(mesh.context), mesh.world.device
    lengths_N = _with_filler(row)
    local_T = zigzag(lengths_N, rank, size)
    token_ids_T, target_ids_T = row.token_ids_T[local_T], row.target_ids_T[local_T]
    trained_R = ((target_ids_T >= 0) & values_at(batch["loss_mask_T"], target_ids_T)).nonzero().flatten()
    target_tokens_R = target_ids_T[trained_R]
    input_ids_T = torch.where(token_ids_T >= 0, values_at(batch["input_ids_T"], token_ids_T), 0)
    starts_N = lengths_N.cumsum(0) - lengths_N
    position_ids_W = torch.arange(row.length) - torch.repeat_interleave(starts_N, lengths_N)
    return RankRow(
        token_ids_T=token_ids_T,
        input_ids_T=input_ids_T.to(device),
        position_ids_T=position_ids_W[local_T].to(device),
        padding_T=(token_ids_T < 0).to(device),
        trained_R=trained_R.to(device),
        targets_R=batch["input_ids_T"][target_tokens_R].to(device),
        target_tokens_R=target_tokens_R,
        loss_inputs=_loss_inputs(row, batch, target_tokens_R, mesh),
        packed=replace(
            _packed(row, lengths_N, local_T, mesh),
            qkv_format=qkv_format,
            mask_ids_RQ=batch["mask_ids_T"][target_tokens_R].to(device) if "mask_ids_T" in batch else None,
        ),
    )


def zigzag(lengths_N: Tensor, rank: int, size: int) -> Tensor:
    """Return the row positions of a context-parallel rank: chunks ``rank`` and ``2 size - 1 - rank`` of each sequence.

    lengths_N: int64, each a multiple of ``2 size``. Causal attention then costs every rank the same.
    """
    if size == 1:
        return torch.arange(int(lengths_N.sum()))
    starts_N, chunk_N = lengths_N.cumsum(0) - lengths_N, lengths_N // (2 * size)
    pieces_N2 = starts_N[:, None] + torch.tensor([rank, 2 * size - 1 - rank]) * chunk_N[:, None]
    return token_positions(pieces_N2.flatten(), chunk_N.repeat_interleave(2))


def _with_filler(row: Row) -> Tensor:
    filler = row.length - int(row.padded_N.sum())
    return torch.cat([row.padded_N, torch.tensor([filler])]) if filler else row.padded_N


def _loss_inputs(row: Row, batch: Batch, target_tokens_R: Tensor, mesh: Mesh) -> LossInputs | None:
    """Return the loss's view of this rank's trained tokens, None before ``prepare`` has added the columns for it."""
    if "weights_T" not in batch:
        return None
    tokens_T = row.token_ids_T[row.token_ids_T >= 0]
    inputs = LossInputs.gather(
        batch,
        target_tokens_R,
        row_positions_R=tokens_T[batch["loss_mask_T"][tokens_T]],
        context_group=mesh.context if group_size(mesh.context) > 1 else None,
    )
    return inputs.map(lambda tensor: tensor.to(mesh.world.device))


def _packed(row: Row, lengths_N: Tensor, local_T: Tensor, mesh: Mesh) -> PackedRow:
    size, device = group_size(mesh.context), mesh.world.device
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)]).to(torch.int32)
    gathered_W = torch.empty(row.length, dtype=torch.int64)
    gathered_W[torch.cat([zigzag(lengths_N, rank, size) for rank in range(size)])] = torch.arange(row.length)
    buckets: list[AttentionBucket] = []
    flat_W, used = torch.full((len(local_T),), -1, dtype=torch.int64), 0
    for members_B in _similar_lengths(row.padded_N):
        bucket, filled_BS = _bucket(members_B, lengths_N, local_T, gathered_W, size)
        flat_W[bucket.query_index_BS[filled_BS]] = used + filled_BS.flatten().nonzero().flatten()
        used += filled_BS.numel()
        mask = None if bucket.mask_B1SS is None else bucket.mask_B1SS.to(device)
        buckets.append(AttentionBucket(bucket.query_index_BS.to(device), bucket.key_index_BS.to(device), mask))
    longest = int(lengths_N.max())
    ends = ends.to(device)
    return PackedRow(
        sequence_ends=ends[: len(row.padded_N) + 1],
        num_tokens=int(row.padded_N.sum()),
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=buckets,
        output_index_T=torch.where(flat_W < 0, used, flat_W).to(device),
    )


def _similar_lengths(lengths_N: Tensor) -> list[Tensor]:
    """Group sequences whose lengths differ by less than a factor of two, so that padding at most doubles the work."""
    _, bits_N = torch.frexp(lengths_N.double())  # 2 ** (bits - 1) <= length < 2 ** bits
    return [(bits_N == bits).nonzero().flatten() for bits in bits_N.unique()]


def _bucket(
    members_B: Tensor, lengths_N: Tensor, local_T: Tensor, gathered_W: Tensor, size: int
) -> tuple[AttentionBucket, Tensor]:
    """Return the bucket of these sequences, and a mask [B, S] of its queries."""
    starts_B = (lengths_N.cumsum(0) - lengths_N)[members_B][:, None]
    lengths_B = lengths_N[members_B][:, None]
    place_S = torch.arange(int(lengths_B.max()))
    key_BS = torch.where(place_S < lengths_B, gathered_W[(starts_B + place_S).clamp(max=len(gathered_W) - 1)], 0)
    place_S = place_S[: len(place_S) // size]
    filled_BS = place_S < lengths_B // size
    query_BS = torch.where(filled_BS, starts_B // size + place_S, 0)
    if size == 1:
        return AttentionBucket(query_BS, key_BS, None), filled_BS
    order_BS = torch.where(filled_BS, local_T[query_BS] - starts_B, 0)
    mask_BSS = torch.arange(key_BS.shape[1]) <= order_BS[:, :, None]
    return AttentionBucket(query_BS, key_BS, mask_BSS[:, None]), filled_BS
