"""Building blocks of families: table entries per kind of layer, and TransformerConfig fields common to all families."""

import math
from collections.abc import Iterable, Mapping

import torch.nn.functional as F

from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping.rules import (
    FusedParam,
    FuseGateUp,
    FuseQKV,
    HFConfig,
    ParamMapping,
    Replicate,
    Shape,
    Shard,
    ShardVocabulary,
)

LAYER, HF = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF + "self_attn."

Mappings = tuple[ParamMapping, ...]
Layers = tuple[int, ...]


def common_fields(hf: HFConfig) -> dict[str, object]:
    """Return the TransformerConfig fields that all families share.

    Raises:
        ConfigError: the activation is not silu, or the attention window is shorter than the maximum sequence length.
    """
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act {activation!r} of config.json is not supported; only silu is")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if window and window < hf["max_position_embeddings"]:
        raise ConfigError(
            f"sliding_window {window} of config.json is shorter than max_position_embeddings "
            f"{hf['max_position_embeddings']}; this family does not support sliding-window attention, so lower "
            "max_position_embeddings to sliding_window"
        )
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
    }


def rope_settings(hf: HFConfig) -> dict[str, object]:
    """Return the rotary settings with the key names of transformers 5, for config.json of any version.

    Raises:
        ConfigError: ``rope_scaling`` and ``rope_parameters`` contradict each other: engines prefer different ones.
    """
    new, old = (_standard_rope(hf, hf.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    if not hf.get("rope_parameters"):
        return old
    if hf.get("rope_scaling") and new != old:
        raise ConfigError(
            f"config.json has rope_parameters = {hf['rope_parameters']} and rope_scaling = {hf['rope_scaling']}, which"
            " differ; inference engines and the trainer would read different ones, so delete the wrong one"
        )
    return new


def _standard_rope(hf: HFConfig, settings: Mapping[str, object]) -> dict[str, object]:
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **settings}
    old_name = rope.pop("type", "default")
    return {"rope_type": old_name, **rope}


def unscaled_rope_base(hf: HFConfig) -> float:
    """Return the base of an unscaled rotary embedding.

    Raises:
        ConfigError: the embedding is scaled.
    """
    rope = rope_settings(hf)
    if rope["rope_type"] != "default":
        raise ConfigError(f"rope_type {rope['rope_type']!r} of config.json is not supported for {hf['model_type']}")
    return float(str(rope["rope_theta"]))


def yarn_fields(hf: HFConfig) -> dict[str, object]:
    """Return the fields of a YaRN rotary embedding (arXiv 2309.00071) for ``YarnConfig``; empty if it is unscaled.

    Raises:
        ConfigError: the embedding is scaled in another way, or ``attention_factor`` cannot be expressed in
            megatron-core.
    """
    rope = rope_settings(hf)
    if rope["rope_type"] != "yarn":
        unscaled_rope_base(hf)
        return {}
    factor, attention_factor = float(str(rope["factor"])), rope.get("attention_factor")
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention_factor is not None:
        if factor <= 1:
            raise ConfigError(
                f"attention_factor {attention_factor} of config.json needs a factor above 1; factor is {factor}"
            )
        scales = (float(str(attention_factor)) - 1) / (0.1 * math.log(factor)), 0.0
    elif not all(scales):
        scales = 1.0, 0.0  # transformers uses mscale and mscale_all_dim only if both are set
    return {
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32,
        "yarn_beta_slow": rope.get("beta_slow") or 1,
        "yarn_mscale": scales[0],
        "yarn_mscale_all_dim": scales[1],
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }


def reject(hf: HFConfig, **unsupported: object) -> None:
    """Raise a ConfigError if config.json has one of these values."""
    for key, value in unsupported.items():
        if hf.get(key) == value:
            raise ConfigError(f"{key} = {value!r} in config.json is not supported for {hf['model_type']}")


def all_layers(hf: HFConfig) -> Layers:
    """Return the indices of all decoder layers."""
    return tuple(range(hf["num_hidden_layers"]))


def embedding_and_head(hf: HFConfig) -> Mappings:
    """Return the embedding, the final norm and, unless tied, the output head."""
    rows, table = ShardVocabulary(hf["vocab_size"]), (hf["vocab_size"], hf["hidden_size"])
    tied = bool(hf.get("tie_word_embeddings", False))
    return (
        ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), rows, (table,)),
        ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",), Replicate(), ((hf["hidden_size"],),)),
        *(() if tied else (ParamMapping("output_layer.weight", ("lm_head.weight",), rows, (table,)),)),
    )


def layer_norms(hf: HFConfig) -> Mappings:
    """Return the norms before attention and before the feed-forward network."""
    shape = ((hf["hidden_size"],),)
    return (
        replicated(LAYER + "input_layernorm.weight", HF + "input_layernorm.weight", shape, all_layers(hf)),
        replicated(LAYER + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight", shape, all_layers(hf)),
    )


def replicated(megatron: str, hf_name: str, shapes: tuple[Shape, ...], layers: Layers) -> ParamMapping:
    """Return an entry that is replicated on every rank."""
    return ParamMapping(megatron, (hf_name,), Replicate(), shapes, layers)


def head_dim(hf: HFConfig) -> int:
    """Return the dimension of an attention head."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def kv_heads(hf: HFConfig) -> int:
    """Return the number of key-value heads; null means one per attention head."""
    heads = hf["num_key_value_heads"]
    return hf["num_attention_heads"] if heads is None else heads


def attention_fields(hf: HFConfig, *, bias: bool, norm: bool) -> dict[str, object]:
    """Return the fields of grouped-query attention."""
    return {
        "num_query_groups": kv_heads(hf),
        "kv_channels": head_dim(hf),
        "add_qkv_bias": bias,
        "qk_layernorm": norm,
    }


def attention(hf: HFConfig, *, bias: bool, norm: bool) -> Mappings:
    """Return grouped-query attention, with ``bias`` on query, key and value or a ``norm`` per query and key head."""
    width, layers = head_dim(hf), all_layers(hf)
    heads, groups, hidden = hf["num_attention_heads"], kv_heads(hf), hf["hidden_size"]
    qkv, rows = FuseQKV(heads, groups, width), (heads * width, groups * width, groups * width)

    def fused(kind: str, shapes: tuple[Shape, ...]) -> ParamMapping:
        parts = tuple(f"{HF_ATTENTION}{part}_proj.{kind}" for part in "qkv")
        return ParamMapping(f"{ATTENTION}linear_qkv.{kind}", parts, qkv, shapes, layers)

    names = [fused("weight", tuple((count, hidden) for count in rows))]
    if bias:
        names.append(fused("bias", tuple((count,) for count in rows)))
    if norm:
        for part in "qk":
            name = f"{part}_norm.weight"
            names.append(replicated(f"{ATTENTION}{part}_layernorm.weight", HF_ATTENTION + name, ((width,),), layers))
    output = ParamMapping(
        ATTENTION + "linear_proj.weight", (HF_ATTENTION + "o_proj.weight",), Shard(1), ((hidden, rows[0]),), layers
    )
    return (*names, output)


def mlp(hf: HFConfig, width: int, layers: Layers, megatron: str = "mlp.", hf_prefix: str = "mlp.") -> Mappings:
    """Return a gated feed-forward network with intermediate size ``width``."""
    hidden, inside, outside = hf["hidden_size"], LAYER + megatron, HF + hf_prefix
    gate_up = (outside + "gate_proj.weight", outside + "up_proj.weight")
    return (
        ParamMapping(inside + "linear_fc1.weight", gate_up, FuseGateUp(), ((width, hidden), (width, hidden)), layers),
        ParamMapping(
            inside + "linear_fc2.weight", (outside + "down_proj.weight",), Shard(1), ((hidden, width),), layers
        ),
    )


def expert_count(hf: HFConfig, key: str) -> int:
    """Return the experts per layer, from the family's key or from transformers 5's ``num_local_experts``."""
    return hf["num_local_experts"] if key not in hf and "num_local_experts" in hf else hf[key]


def router(hf: HFConfig, experts: int, layers: Layers, hf_name: str = "mlp.gate.weight") -> Mappings:
    """Return the router's weight."""
    return (replicated(LAYER + "mlp.router.weight", HF + hf_name, ((experts, hf["hidden_size"]),), layers),)


def router_bias(experts: int, layers: Layers) -> Mappings:
    """Return the bias that affects which experts are chosen but not their gate weights; it gets no gradient."""
    name = HF + "mlp.gate.e_score_correction_bias"
    return (replicated(LAYER + "mlp.router.expert_bias", name, ((experts,),), layers),)


EXPERT_PARTS = (
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
"""Names of an expert's gate, up and down matrices in most families."""


def experts(hf: HFConfig, count: int, width: int, layers: Layers, parts: tuple[str, ...] = EXPERT_PARTS) -> Mappings:
    """Return ``count`` experts, each a gated feed-forward network with intermediate size ``width``."""
    hidden, inside = hf["hidden_size"], LAYER + "mlp.experts.local_experts.{expert}."
    gate, up, down = (HF + part for part in parts)
    wide = ((width, hidden), (width, hidden))
    return (
        ParamMapping(inside + "linear_fc1.weight", (gate, up), FuseGateUp(), wide, layers, count),
        ParamMapping(inside + "linear_fc2.weight", (down,), Shard(1), ((hidden, width),), layers, count),
    )


def fused_experts(parts: tuple[str, ...] = EXPERT_PARTS) -> tuple[FusedParam, ...]:
    """Return the fused form: per layer one tensor with all gate and up matrices and one with all down matrices."""
    gate, up, down = (HF + part for part in parts)
    return (
        FusedParam(HF + "mlp.experts.gate_up_proj", (gate, up)),
        FusedParam(HF + "mlp.experts.down_proj", (down,)),
    )


def mtp_layers(hf: HFConfig) -> tuple[str, ...]:
    """Return patterns of the multi-token-prediction layers, which follow the decoder layers and are not trained."""
    first = hf["num_hidden_layers"]
    return tuple(rf"model\.layers\.{first + number}\..*" for number in range(hf.get("num_nextn_predict_layers") or 0))


def moe_fields(hf: HFConfig, layers: Iterable[int], *, count: int, width: int) -> dict[str, object]:
    """Return the TransformerConfig fields for mixture-of-experts in these layers."""
    sparse = set(layers)
    return {
        "num_moe_experts": count,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": width,
        "moe_layer_freq": [int(layer in sparse) for layer in all_layers(hf)],
    }


ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Patterns of rotary buffers in old checkpoints; they can be computed from config.json."""
