"""The widths of a model that its activations and operations follow from, and the work of one micro-batch."""

from dataclasses import dataclass

from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class Widths:
    """Sizes of one layer of a model, over all ranks together.

    Attributes:
        query: dimensions of a query and key head.
        value: dimensions of a value head.
        rotary: dimensions of a head that rotate.
        query_rank: of latent attention's way to the queries; 0 where there is none.
        latent_rank: of its way to keys and values; 0: attention is not latent.
        nope: dimensions of a query head that do not rotate; only where attention is latent.
        norms_heads: queries and keys are normalised head by head.
        shared_ffn: width of the expert that all tokens share, 0 where there is none.
        window: tokens that a query of a windowed layer sees; 0: all.
        windowed: layers with a window.
        biased_routing: the router scores experts by sigmoids.
    """

    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    query: int
    value: int
    rotary: int
    query_rank: int
    latent_rank: int
    nope: int
    norms_heads: bool
    ffn: int
    experts: int
    per_token: int
    expert_ffn: int
    shared_ffn: int
    window: int
    windowed: int
    biased_routing: bool


def widths_of(family: Family) -> Widths:
    """Return the widths of a model as its family read them from ``config.json``."""

    def size(name: str) -> int:
        return int(str(family.fields.get(name) or 0))

    heads, latent = size("num_attention_heads"), family.has_latent_attention
    nope, turning = (size("qk_head_dim"), size("qk_pos_emb_head_dim")) if latent else (0, 0)
    head_dim = size("kv_channels") or size("hidden_size") // heads
    return Widths(
        hidden=size("hidden_size"),
        vocabulary=family.vocab_size,
        heads=heads,
        kv_heads=heads if latent else size("num_query_groups") or heads,
        query=nope + turning if latent else head_dim,
        value=size("v_head_dim") if latent else head_dim,
        rotary=turning if latent else int(head_dim * family.rotary_percent),
        query_rank=size("q_lora_rank"),
        latent_rank=size("kv_lora_rank"),
        nope=nope,
        norms_heads=not latent and bool(family.fields.get("qk_layernorm")),
        ffn=size("ffn_hidden_size"),
        experts=family.num_experts,
        per_token=size("moe_router_topk"),
        expert_ffn=size("moe_ffn_hidden_size"),
        shared_ffn=size("moe_shared_expert_intermediate_size"),
        window=family.window,
        windowed=family.windowed_layers,
        biased_routing=family.fields.get("moe_router_score_function") == "sigmoid",
    )


@dataclass(frozen=True)
class Work:
    """One micro-batch of a rank.

    Attributes:
        row: tokens of the packed row, over all context-parallel ranks.
        longest: tokens of its sequences, at most.
        trained: tokens of the row whose log-probs are asked for.
        bytes: of one number in the weights' type.
        imbalance: tokens of the busiest rank's experts, as a multiple of the average.
        fused: transformer-engine's kernels; else those of the local layers on a CPU, which were measured.
    """

    row: int
    longest: int
    trained: int
    bytes: int
    imbalance: float
    fused: bool
