"""What a layer keeps for the backward pass, tensor by tensor, in bytes of one rank.

The local layers' account is what autograd was seen to save on a CPU (benchmarks/memory_plan.py compares the sum with
measured peaks). transformer-engine's differs in the norms, which keep their input once and in its own type, and in
attention, which keeps queries, keys and values as they are; that account was not measured.

Legend: T tokens that attention sees on this rank, S those between layers (T, or a share of it under sequence
parallelism), R tokens that arrive at this rank's experts, one for each expert that a token is sent to.
"""

from dataclasses import dataclass

from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.widths import Widths, Work

WIDE = 4
"""Bytes of a float32."""

GATED = 5
"""Widths of a gated network that are kept: gate and up as one product, the gate again, its silu, gate times up."""

GATED_EXPERT = 6
"""Of an expert: as above, and the product times the router's weight."""


@dataclass(frozen=True)
class Share:
    """A rank's share of a micro-batch.

    Attributes:
        T: tokens that attention sees.
        S: tokens between layers.
        R: tokens that arrive at the experts.
    """

    T: int
    S: int
    R: float


def share_of(work: Work, widths: Widths, layout: Layout) -> Share:
    """Return a rank's share of a micro-batch."""
    tokens = work.row // layout.context
    between = tokens // layout.tensor if layout.sequence else tokens
    busiest = work.imbalance if layout.expert > 1 else 1.0
    return Share(tokens, between, between * widths.per_token * layout.expert_tensor * busiest)


def gathered_tokens(share: Share, layout: Layout, work: Work) -> int:
    """Return the tokens whose keys a rank keeps: the row's; but transformer-engine passes keys from rank to rank."""
    return share.T if work.fused else share.T * layout.context


def layer_bytes(widths: Widths, layout: Layout, work: Work, *, sparse: bool, keeps_attention: bool = True) -> float:
    """Return what one layer keeps; without ``keeps_attention`` its scores are computed again (selective)."""
    share = share_of(work, widths, layout)
    attention = latent_attention_bytes if widths.latent_rank else attention_bytes
    network = experts_bytes if sparse else dense_bytes
    return (
        2 * norm_bytes(widths.hidden, share.S, work)
        + attention(widths, layout, work, keeps_attention)
        + network(widths, layout, work)
    )


def norm_bytes(width: float, tokens: float, work: Work) -> float:
    """Return what a norm keeps: its input and the normalised input, in float32, and a factor a token."""
    return tokens * ((work.bytes if work.fused else 2 * WIDE) * width + WIDE)


def attention_bytes(widths: Widths, layout: Layout, work: Work, keeps_scores: bool) -> float:
    """Return what grouped-query attention keeps."""
    share, size = share_of(work, widths, layout), work.bytes
    heads, groups, dim = widths.heads / layout.tensor, widths.kv_heads / layout.tensor, widths.query
    whole_qkv = share.T * (heads + 2 * groups) * dim * size
    kept = share.S * widths.hidden * size + 4 * share.T * widths.rotary * size
    if widths.norms_heads:
        kept += norm_bytes(dim, share.T * (heads + groups), work)
        if not work.fused and size == WIDE:
            kept += (
                whole_qkv - share.T * groups * dim * size
            )  # the keys' norm holds on to the product they are cut from
    expanded = groups if work.fused else heads
    if keeps_scores:
        keys = 2 * gathered_tokens(share, layout, work) * expanded * dim * size
        kept += 2 * share.T * heads * dim * size + keys + WIDE * share.T * heads
    else:
        kept += share.T * (heads + groups) * dim * size + whole_qkv
    return kept + (0 if work.fused else share.T * heads * dim * size)


def latent_attention_bytes(widths: Widths, layout: Layout, work: Work, keeps_scores: bool) -> float:
    """Return what latent attention keeps: the latents and their norms, and attention over all heads."""
    share, size = share_of(work, widths, layout), work.bytes
    heads = widths.heads / layout.tensor
    kept = share.S * widths.hidden * size + 4 * share.T * widths.rotary * size
    for rank in (widths.query_rank, widths.latent_rank):
        if rank:
            kept += norm_bytes(rank, share.S, work) + share.S * rank * size
    keys = gathered_tokens(share, layout, work)
    if not keeps_scores:
        kept += share.T * heads * (2 * widths.query + widths.nope + widths.value) * size
    elif work.fused:
        kept += heads * size * (share.T * (widths.query + widths.value) + keys * (widths.query + widths.value))
        kept += WIDE * share.T * heads
    else:  # heads of two widths: torch's CPU kernel writes all scores down, in float32
        kept += heads * WIDE * (share.T * (widths.query + work.longest) + keys * (widths.query + widths.value))
    return kept + (0 if work.fused else share.T * heads * widths.value * size)


def dense_bytes(widths: Widths, layout: Layout, work: Work) -> float:
    """Return what a gated feed-forward network keeps."""
    share = share_of(work, widths, layout)
    return work.bytes * (share.S * widths.hidden + GATED * share.T * widths.ffn / layout.tensor)


def experts_bytes(widths: Widths, layout: Layout, work: Work) -> float:
    """Return what router, shared expert and experts keep: dispatched tokens, their networks, what comes back."""
    share, size = share_of(work, widths, layout), work.bytes
    chosen = share.S * widths.per_token
    router = share.S * (5 + 4 * widths.biased_routing) * widths.experts + 20 * chosen
    shared = GATED * share.T * widths.shared_ffn / layout.tensor * size
    experts = share.R * (size * (widths.hidden + GATED_EXPERT * widths.expert_ffn / layout.expert_tensor) + WIDE)
    return share.S * widths.hidden * size + router + shared + experts + chosen * widths.hidden * size
