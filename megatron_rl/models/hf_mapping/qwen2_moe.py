"""Qwen2-MoE: bias on query, key and value, and a shared expert with a sigmoid gate."""

from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.qwen3_moe import split_layers
from megatron_rl.models.hf_mapping.rules import Family, HFConfig


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``qwen2_moe``."""
    count, width = blocks.expert_count(hf, "num_experts"), hf["moe_intermediate_size"]
    shared, (dense, sparse) = hf["shared_expert_intermediate_size"], split_layers(hf)
    attention = {"bias": bool(hf.get("qkv_bias", True)), "norm": False}
    gate = ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight")
    return Family(
        fields={
            **blocks.common_fields(hf),
            **blocks.attention_fields(hf, **attention),
            **blocks.moe_fields(hf, sparse, count=count, width=width),
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
            "moe_shared_expert_intermediate_size": shared,
            "moe_shared_expert_gate": True,
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, **attention),
            *blocks.mlp(hf, hf["intermediate_size"], dense),
            *blocks.router(hf, count, sparse),
            *blocks.experts(hf, count, width, sparse),
            *blocks.mlp(hf, shared, sparse, "mlp.shared_experts.", "mlp.shared_expert."),
            blocks.replicated(blocks.LAYER + gate[0], blocks.HF + gate[1], ((1, hf["hidden_size"]),), sparse),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=blocks.unscaled_rope_base(hf),
        tied=bool(hf.get("tie_word_embeddings", False)),
        dense_layers=frozenset(dense),
        fused=blocks.fused_experts(),
    )
