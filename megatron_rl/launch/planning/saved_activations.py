"""Bytes per rank that a layer saves for its backward pass, tensor by tensor.

The counts for local layers follow what autograd saves on a CPU; benchmarks/memory_plan.py compares their sum with
measured peaks. The counts for transformer-engine's layers were not measured. They differ in the norms, which save
their input once and in its own dtype, and in attention, which saves queries, keys and values unchanged.
"""

from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.microbatch import MicrobatchWork, gathered_tokens, rank_tokens
from megatron_rl.launch.planning.model_sizes import ModelSizes

FLOAT32 = 4
"""Bytes per float32 number."""

GATED = 5
"""Saved widths of a gated network: gate and up as one product, the gate again, silu(gate), silu(gate) * up."""

GATED_EXPERT = 6
"""Saved widths of an expert: those of a gated network, and the product times the router's weight."""


Modules = frozenset[str]
"""Recomputed modules, under megatron-core's names (``recompute_modules``)."""


def layer_bytes(
    sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, *, sparse: bool, recomputed: Modules = frozenset()
) -> float:
    """Return the bytes that one layer saves if some of its modules are recomputed."""
    tokens = rank_tokens(work, sizes, layout)
    layer_input = tokens.residual * sizes.hidden * work.dtype_bytes
    attention = latent_attention_bytes if sizes.latent_rank else attention_bytes
    saved = attention(sizes, layout, work, recomputed)
    if ("moe" if sparse else "mlp") in recomputed:
        saved += layer_input
    else:
        saved += experts_bytes(sizes, layout, work, recomputed) if sparse else dense_bytes(sizes, layout, work)
    if "layernorm" in recomputed:  # the inputs of attention and of the network are recomputed from those of the norms
        return saved
    return saved + 2 * norm_bytes(sizes.hidden, tokens.residual, work)


def norm_bytes(width: float, tokens: float, work: MicrobatchWork) -> float:
    """Return the bytes that a norm saves: its input, the normalized input in float32, and one factor per token."""
    return tokens * ((work.dtype_bytes if work.fused else 2 * FLOAT32) * width + FLOAT32)


def attention_bytes(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, recomputed: Modules) -> float:
    """Return the bytes that grouped-query attention saves."""
    tokens, size = rank_tokens(work, sizes, layout), work.dtype_bytes
    heads, groups, dim = sizes.heads / layout.tensor, sizes.kv_heads / layout.tensor, sizes.query_dim
    qkv = tokens.attention * (heads + 2 * groups) * dim * size
    saved = tokens.residual * sizes.hidden * size + 4 * tokens.attention * sizes.rotary_dim * size
    if sizes.qk_norm:
        saved += norm_bytes(dim, tokens.attention * (heads + groups), work)
        if not work.fused and size == FLOAT32:  # the norm of the keys saves a view into the whole product
            saved += qkv - tokens.attention * groups * dim * size
    expanded = groups if work.fused else heads
    if "core_attn" not in recomputed:
        keys = 2 * gathered_tokens(tokens, layout, work) * expanded * dim * size
        saved += 2 * tokens.attention * heads * dim * size + keys + FLOAT32 * tokens.attention * heads
    else:
        saved += tokens.attention * (heads + groups) * dim * size + qkv
    return saved + (0 if work.fused else tokens.attention * heads * dim * size)


def latent_attention_bytes(
    sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, recomputed: Modules
) -> float:
    """Return the bytes that multi-head latent attention saves: the latents, their norms, and attention."""
    tokens, size = rank_tokens(work, sizes, layout), work.dtype_bytes
    heads, dims = sizes.heads / layout.tensor, sizes.query_dim + sizes.value_dim
    saved = tokens.residual * sizes.hidden * size + 4 * tokens.attention * sizes.rotary_dim * size
    for rank in (sizes.query_rank, sizes.latent_rank):
        if rank:
            saved += norm_bytes(rank, tokens.residual, work) + tokens.residual * rank * size
    keys = gathered_tokens(tokens, layout, work)
    # Values are padded to the width of the keys.
    query_key, padded = tokens.attention + keys, 2 * sizes.query_dim
    if "core_attn" in recomputed:
        saved += heads * size * (3 * tokens.attention) * sizes.query_dim
    else:
        saved += heads * size * query_key * (dims if work.fused else padded) + FLOAT32 * tokens.attention * heads
    if "mla_up_proj" in recomputed and work.fused:  # local attention saves copies of queries and keys
        saved -= heads * size * query_key * sizes.query_dim
    return saved + (0 if work.fused else tokens.attention * heads * sizes.value_dim * size)


def dense_bytes(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork) -> float:
    """Return the bytes that a dense gated feed-forward network saves."""
    tokens = rank_tokens(work, sizes, layout)
    return work.dtype_bytes * (tokens.residual * sizes.hidden + GATED * tokens.attention * sizes.ffn / layout.tensor)


def experts_bytes(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, recomputed: Modules) -> float:
    """Return the bytes that the router, the shared expert and the experts save, dispatched tokens included."""
    tokens, size = rank_tokens(work, sizes, layout), work.dtype_bytes
    chosen = tokens.residual * sizes.experts_per_token
    router = tokens.residual * (5 + 4 * sizes.sigmoid_router) * sizes.experts + 20 * chosen
    shared = GATED * tokens.attention * sizes.shared_ffn / layout.tensor * size
    shared = 0 if "shared_experts" in recomputed else shared
    gated = 2 if "moe_act" in recomputed else GATED_EXPERT  # gate and up only
    expert_widths = sizes.hidden + gated * sizes.expert_ffn / layout.expert_tensor
    experts = tokens.expert * (size * expert_widths + FLOAT32)
    return tokens.residual * sizes.hidden * size + router + shared + experts + chosen * sizes.hidden * size
