"""Mixtral: experts in every layer, no shared expert, softmax over the selected experts (arXiv 2401.04088)."""

from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.rules import Family, FusedParam, HFConfig

_PARTS = tuple(f"block_sparse_moe.experts.{{expert}}.{name}.weight" for name in ("w1", "w3", "w2"))
_GATE = "block_sparse_moe.gate.weight"


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``mixtral``."""
    count, width, layers = hf["num_local_experts"], hf["intermediate_size"], blocks.all_layers(hf)
    attention = {"bias": False, "norm": False}
    return Family(
        fields={
            **blocks.common_fields(hf),
            **blocks.attention_fields(hf, **attention),
            **blocks.moe_fields(hf, layers, count=count, width=width),
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, **attention),
            *blocks.router(hf, count, layers, _GATE),
            *blocks.experts(hf, count, width, layers, _PARTS),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=blocks.unscaled_rope_base(hf),
        tied=bool(hf.get("tie_word_embeddings", False)),
        fused=(*blocks.fused_experts(_PARTS), FusedParam(blocks.HF + "mlp.gate.weight", (blocks.HF + _GATE,))),
    )
