"""Qwen3-MoE: names, layouts and shapes."""

import torch.nn.functional as F

from megatron_rl.errors import ConfigError
from megatron_rl.policy.names.rules import QKV, Family, GateUp, HFConfig, Name, Split, VocabularyRows, Whole

_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."
_HF_EXPERT = _HF + "mlp.experts.{expert}."


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``qwen3_moe``."""
    hidden, heads, groups = hf["hidden_size"], hf["num_attention_heads"], hf["num_key_value_heads"]
    head_dim = hf.get("head_dim") or hidden // heads
    experts = hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]
    sparse_step, layers = hf.get("decoder_sparse_step", 1), hf["num_hidden_layers"]
    dense = frozenset(n for n in range(layers) if n in hf.get("mlp_only_layers", ()) or (n + 1) % sparse_step)
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} of config.json is not supported for qwen3_moe; only default is"
        )
    fields = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": bool(hf.get("attention_bias", False)),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "num_moe_experts": experts,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_layer_freq": [int(n not in dense) for n in range(layers)],
    }
    if fields["add_qkv_bias"]:
        raise ConfigError("attention_bias is true in config.json; the qwen3_moe table has no bias tensors")
    return Family(
        fields=fields,
        names=_names(hf["vocab_size"], QKV(heads, groups, head_dim), bool(hf.get("tie_word_embeddings", False))),
        hf_shapes=_shapes(hf, head_dim, experts),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=rope["rope_theta"],
        tied=bool(hf.get("tie_word_embeddings", False)),
        dense_layers=dense,
    )


def _names(vocab_size: int, qkv: QKV, tied: bool) -> tuple[Name, ...]:
    attention = tuple(_HF + f"self_attn.{part}_proj.weight" for part in "qkv")
    head = () if tied else (Name("output_layer.weight", ("lm_head.weight",), VocabularyRows(vocab_size)),)
    return (
        Name("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VocabularyRows(vocab_size)),
        Name(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Whole()),
        Name(_LAYER + "self_attention.linear_qkv.weight", attention, qkv),
        Name(_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), Whole()),
        Name(_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), Whole()),
        Name(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Split(1)),
        Name(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Whole()),
        Name(_LAYER + "mlp.router.weight", (_HF + "mlp.gate.weight",), Whole()),
        Name(_EXPERT + "linear_fc1.weight", (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"), GateUp()),
        Name(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), Split(1)),
        Name(_LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), GateUp()),
        Name(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Split(1)),
        Name("decoder.final_layernorm.weight", ("model.norm.weight",), Whole()),
        *head,
    )


def _shapes(hf: HFConfig, head_dim: int, experts: int) -> dict[str, tuple[int, ...]]:
    hidden, wide, narrow = hf["hidden_size"], hf["intermediate_size"], hf["moe_intermediate_size"]
    query, key = hf["num_attention_heads"] * head_dim, hf["num_key_value_heads"] * head_dim
    return {
        "model.embed_tokens.weight": (hf["vocab_size"], hidden),
        _HF + "input_layernorm.weight": (hidden,),
        _HF + "self_attn.q_proj.weight": (query, hidden),
        _HF + "self_attn.k_proj.weight": (key, hidden),
        _HF + "self_attn.v_proj.weight": (key, hidden),
        _HF + "self_attn.q_norm.weight": (head_dim,),
        _HF + "self_attn.k_norm.weight": (head_dim,),
        _HF + "self_attn.o_proj.weight": (hidden, query),
        _HF + "post_attention_layernorm.weight": (hidden,),
        _HF + "mlp.gate.weight": (experts, hidden),
        _HF_EXPERT + "gate_proj.weight": (narrow, hidden),
        _HF_EXPERT + "up_proj.weight": (narrow, hidden),
        _HF_EXPERT + "down_proj.weight": (hidden, narrow),
        _HF + "mlp.gate_proj.weight": (wide, hidden),
        _HF + "mlp.up_proj.weight": (wide, hidden),
        _HF + "mlp.down_proj.weight": (hidden, wide),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (hf["vocab_size"], hidden),
    }
