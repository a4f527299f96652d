"""GLM-4.5 (arXiv 2508.06471): partial rotary embedding, DeepSeek-V3's routing, dense first layers, a shared expert."""

from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.deepseek import biased_routing
from megatron_rl.models.hf_mapping.rules import Family, HFConfig


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``glm4_moe``."""
    layers, first = blocks.all_layers(hf), hf["first_k_dense_replace"]
    dense, sparse = layers[:first], layers[first:]
    count = blocks.expert_count(hf, "n_routed_experts")
    width = hf["moe_intermediate_size"]
    shared = width * hf["n_shared_experts"]
    attention = {"bias": bool(hf.get("attention_bias", False)), "norm": bool(hf.get("use_qk_norm", False))}
    partial = blocks.rope_settings(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
    return Family(
        fields={
            **blocks.common_fields(hf),
            **blocks.attention_fields(hf, **attention),
            **blocks.moe_fields(hf, sparse, count=count, width=width),
            **biased_routing(hf),
            "moe_shared_expert_intermediate_size": shared,
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, **attention),
            *blocks.mlp(hf, hf["intermediate_size"], dense),
            *blocks.router(hf, count, sparse),
            *blocks.router_bias(count, sparse),
            *blocks.experts(hf, count, width, sparse),
            *blocks.mlp(hf, shared, sparse, "mlp.shared_experts.", "mlp.shared_experts."),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=blocks.unscaled_rope_base(hf),
        rotary_percent=float(str(partial)),
        tied=bool(hf.get("tie_word_embeddings", False)),
        dense_layers=frozenset(dense),
        fused=blocks.fused_experts(),
        passthrough=blocks.mtp_layers(hf),
    )
