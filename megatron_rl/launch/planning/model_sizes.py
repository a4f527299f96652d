"""Sizes of a model that layouts, memory and operation counts depend on."""

from dataclasses import dataclass

from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model over all ranks together; expert sizes are 0 for a dense model.

    Attributes:
        positions: maximum sequence length, in tokens.
        query_dim: dimensions per query and key head.
        value_dim: dimensions per value head.
        rotary_dim: rotated dimensions per head.
        nope_dim: dimensions per query head without rotation; multi-head latent attention (MLA) only.
        query_rank: rank of the query compression of MLA, 0 without one.
        latent_rank: rank of the key-value compression of MLA, 0 for grouped-query attention.
        qk_norm: queries and keys are normalized per head.
        attention_sinks: attention has one learned sink per head.
        window: tokens that a query of a sliding-window layer sees, 0 without windows.
        windowed_layers: number of sliding-window layers.
        ffn: width of a dense feed-forward network.
        has_dense_layers: at least one layer has a dense feed-forward network.
        experts_per_token: experts that a token is routed to.
        expert_ffn: width of one expert.
        shared_ffn: width of the shared expert, 0 without one.
        experts_have_bias: the experts' linear layers have biases.
        sigmoid_router: the router scores experts with sigmoids instead of a softmax.
    """

    layers: int
    hidden: int
    vocabulary: int
    positions: int
    heads: int
    kv_heads: int
    query_dim: int
    value_dim: int
    rotary_dim: int
    nope_dim: int
    query_rank: int
    latent_rank: int
    qk_norm: bool
    attention_sinks: bool
    window: int
    windowed_layers: int
    ffn: int
    has_dense_layers: bool
    experts: int
    experts_per_token: int
    expert_ffn: int
    shared_ffn: int
    experts_have_bias: bool
    sigmoid_router: bool


def model_sizes(family: Family) -> ModelSizes:
    """Return the sizes of a model as its family read them from ``config.json``."""
    fields = family.fields

    def size(name: str) -> int:
        return int(str(fields.get(name) or 0))

    heads, hidden, latent = size("num_attention_heads"), size("hidden_size"), family.has_latent_attention
    head_dim = size("kv_channels") or hidden // heads
    nope_dim, rotary_dim = (size("qk_head_dim"), size("qk_pos_emb_head_dim")) if latent else (0, 0)
    return ModelSizes(
        layers=family.num_layers,
        hidden=hidden,
        vocabulary=family.vocab_size,
        positions=family.max_position_embeddings,
        heads=heads,
        kv_heads=heads if latent else size("num_query_groups") or heads,
        query_dim=nope_dim + rotary_dim if latent else head_dim,
        value_dim=size("v_head_dim") if latent else head_dim,
        rotary_dim=rotary_dim if latent else int(head_dim * family.rotary_percent),
        nope_dim=nope_dim,
        query_rank=size("q_lora_rank"),
        latent_rank=size("kv_lora_rank"),
        qk_norm=not latent and bool(fields.get("qk_layernorm")),
        attention_sinks=fields.get("softmax_type") == "learnable",
        window=family.attention_window,
        windowed_layers=family.num_windowed_layers,
        ffn=size("ffn_hidden_size"),
        has_dense_layers=not family.num_experts or bool(family.dense_layers),
        experts=family.num_experts,
        experts_per_token=size("moe_router_topk"),
        expert_ffn=size("moe_ffn_hidden_size"),
        shared_ffn=size("moe_shared_expert_intermediate_size"),
        experts_have_bias=family.num_experts > 0 and bool(fields.get("add_bias_linear")),
        sigmoid_router=fields.get("moe_router_score_function") == "sigmoid",
    )
