"""gpt-oss (arXiv 2508.10925): attention sinks and biases, alternating windows, YaRN, biased experts, clamped gate.

Checkpoints store the experts of a layer stacked in one tensor: matrices transposed, gate and up columns interleaved.
"""

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.rules import (
    Family,
    FusedParam,
    FuseInterleavedGateUp,
    HFConfig,
    ParamMapping,
    Replicate,
    Shard,
    ShardRule,
)

ALPHA = 1.702
"""Constant of the gate's activation, x * sigmoid(ALPHA * x)."""


def quick_gelu(gate: Tensor) -> Tensor:
    """Return gate * sigmoid(ALPHA * gate), same shape."""
    return gate * torch.sigmoid(ALPHA * gate)


def family(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``gpt_oss``."""
    blocks.reject(hf, attention_bias=False)
    if (alpha := hf.get("swiglu_alpha", ALPHA)) != ALPHA:
        raise ConfigError(f"swiglu_alpha {alpha} of config.json is not supported; only {ALPHA} is")
    layers, count, width = blocks.all_layers(hf), hf["num_local_experts"], hf["intermediate_size"]
    attention = {"bias": True, "norm": False}
    experts = stacked_experts(hf, count, width)
    return Family(
        fields={
            **blocks.common_fields({**hf, "sliding_window": None}),
            **blocks.attention_fields(hf, **attention),
            **blocks.moe_fields(hf, layers, count=count, width=width),
            **window_fields(hf),
            **blocks.yarn_fields(hf),
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "activation_func": quick_gelu,
            "activation_func_clamp_value": hf.get("swiglu_limit", 7.0),
            "glu_linear_offset": 1.0,
        },
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, **attention),
            _vector("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hf["hidden_size"], hf),
            _vector(
                "self_attention.core_attention.softmax_offset", "self_attn.sinks", hf["num_attention_heads"], hf, 0
            ),
            *blocks.router(hf, count, layers, "mlp.router.weight"),
            _vector("mlp.router.bias", "mlp.router.bias", count, hf),
            *experts,
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=float(str(blocks.rope_settings(hf)["rope_theta"])),
        tied=bool(hf.get("tie_word_embeddings", False)),
        fused=tuple(FusedParam(name.hf[0].replace("{expert}.", ""), name.hf, required=True) for name in experts),
    )


def window_fields(hf: HFConfig) -> dict[str, object]:
    """Return the fields of sliding-window attention: the window size and which layers use it.

    Raises:
        ConfigError: ``layer_types`` has an unknown value or the wrong length.
    """
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    kinds = kinds or [("sliding_attention", "full_attention")[layer % 2] for layer in blocks.all_layers(hf)]
    if unknown := sorted({str(kind) for kind in kinds} - {"sliding_attention", "full_attention"}):
        raise ConfigError(f"layer_types of config.json names {unknown[0]!r}; known: sliding_attention, full_attention")
    if len(kinds) != hf["num_hidden_layers"]:
        raise ConfigError(f"layer_types of config.json has {len(kinds)} entries for {hf['num_hidden_layers']} layers")
    if not window:
        return {}
    # transformers counts the query token as part of the window; megatron-core does not
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }


def stacked_experts(hf: HFConfig, count: int, width: int) -> tuple[ParamMapping, ...]:
    """Return the experts; each entry maps one expert's slice of the stacked tensor."""
    hidden, layers = hf["hidden_size"], blocks.all_layers(hf)

    def part(megatron: str, hf_name: str, rule: ShardRule, shape: tuple[int, ...]) -> ParamMapping:
        inside = blocks.LAYER + "mlp.experts.local_experts.{expert}." + megatron
        return ParamMapping(inside, (blocks.HF + "mlp.experts.{expert}." + hf_name,), rule, (shape,), layers, count)

    return (
        part("linear_fc1.weight", "gate_up_proj", FuseInterleavedGateUp(), (hidden, 2 * width)),
        part("linear_fc1.bias", "gate_up_proj_bias", FuseInterleavedGateUp(), (2 * width,)),
        part("linear_fc2.weight", "down_proj", Shard(1, transposed=True), (width, hidden)),
        part("linear_fc2.bias", "down_proj_bias", Replicate(), (hidden,)),
    )


def _vector(megatron: str, hf_name: str, size: int, hf: HFConfig, dim: int | None = None) -> ParamMapping:
    """Return an entry with one dimension, sharded over tensor-parallel ranks if ``dim`` is given."""
    rule = Replicate() if dim is None else Shard(dim)
    return ParamMapping(blocks.LAYER + megatron, (blocks.HF + hf_name,), rule, ((size,),), blocks.all_layers(hf))
