"""Qwen3-MoE: RMSNorm on queries and keys, softmax routing (arXiv 2505.09388)."""

from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.rules import Family, HFConfig


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``qwen3_moe``."""
    if hf.get("attention_bias", False):
        raise ConfigError("attention_bias is true in config.json; the qwen3_moe table has no bias tensors")
    count, width = blocks.expert_count(hf, "num_experts"), hf["moe_intermediate_size"]
    dense, sparse = split_layers(hf)
    attention = {"bias": False, "norm": True}
    return Family(
        fields={
            **blocks.common_fields(hf),
            **blocks.attention_fields(hf, **attention),
            **blocks.moe_fields(hf, sparse, count=count, width=width),
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, **attention),
            *blocks.mlp(hf, hf["intermediate_size"], dense),
            *blocks.router(hf, count, sparse),
            *blocks.experts(hf, count, width, sparse),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=blocks.unscaled_rope_base(hf),
        tied=bool(hf.get("tie_word_embeddings", False)),
        dense_layers=frozenset(dense),
        fused=blocks.fused_experts(),
    )


def split_layers(hf: HFConfig) -> tuple[blocks.Layers, blocks.Layers]:
    """Return the dense layers and the layers with experts, from Qwen's config keys."""
    step, named = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    layers = blocks.all_layers(hf)
    sparse = tuple(layer for layer in layers if layer not in named and (layer + 1) % step == 0)
    return tuple(layer for layer in layers if layer not in sparse), sparse
