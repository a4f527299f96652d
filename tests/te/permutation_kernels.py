"""Reference implementations, in torch, of transformer-engine's Triton kernels that sort tokens by expert.

``FUNCTIONS`` lists them under their names in ``transformer_engine.pytorch.triton.permutation``, with equal parameters.
``test_kernels`` compares them with the kernels themselves, which Triton's interpreter runs on a CPU, too slowly for a
model. FP8 scales and padding are refused by assertions.

Legend: T tokens, E experts, K experts of a token, P rows after the permutation, H features.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Return int32 [T, 2 E + 1]: rows of each token, descending; from E on, their experts; at the end, their number."""
    map_ET = routing_map.bool().T
    row_ET = map_ET.flatten().cumsum(0).view_as(map_ET) - 1
    row_TE = torch.where(map_ET, row_ET, -1).T
    rows_TE, experts_TE = row_TE.sort(dim=1, descending=True, stable=True)
    counts_T1 = routing_map.bool().sum(1, keepdim=True)
    return torch.cat([rows_TE, experts_TE, counts_T1], dim=1).to(torch.int32)


def routes(row_id_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens, experts and rows of all pairs of a token and one of its experts."""
    used_TE = torch.arange(num_experts) < row_id_map[:, -1:]
    tokens = used_TE.nonzero()[:, 0]
    rows_TE, experts_TE = row_id_map[:, :num_experts].long(), row_id_map[:, num_experts : 2 * num_experts].long()
    return tokens, experts_TE[used_TE], rows_TE[used_TE]


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[Tensor, None, Tensor | None]:
    """Return (the tokens of expert 0, then of expert 1, ..., None, their probabilities)."""
    assert scale is None
    assert pad_offsets is None
    tokens, experts, rows = routes(row_id_map, num_experts)
    assert len(rows) == num_out_tokens, (len(rows), num_out_tokens)
    output = inp.new_empty(num_out_tokens, hidden_size)
    output[rows] = inp[tokens]
    if probs is None:
        return output, None, None
    output_probs = probs.new_empty(num_out_tokens)
    output_probs[rows] = probs[tokens, experts]
    return output, None, output_probs


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    pad_offsets: Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Return (the sum of each token's rows, accumulated in float32, the probabilities [T, E])."""
    assert merging_probs is None
    assert pad_offsets is None
    tokens, experts, rows = routes(row_id_map, num_experts)
    wide = inp.float()
    output = wide.new_zeros(num_tokens, hidden_size).index_add(0, tokens, wide[rows]).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs_TE = permuted_probs.new_zeros(num_tokens, num_experts)
    probs_TE[tokens, experts] = permuted_probs[rows]
    return output, probs_TE


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """Return int32 [T]: the new row of each token if the chunks are put in the given order."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    order = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    return order.argsort().to(torch.int32)


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (the tokens in the new order, or back, their probabilities)."""
    order = row_id_map.long().argsort() if is_forward else row_id_map.long()
    return inp[order], None if probs is None else probs[order]


FUNCTIONS: Mapping[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        make_row_id_map,
        permute_with_mask_map,
        unpermute_with_mask_map,
        make_chunk_sort_map,
        sort_chunks_by_map,
    )
}
