"""Converts parameter names between transformer-engine's layer spec and the local layer spec.

megatron-core's checkpoints use transformer-engine's names: a norm is fused into the linear layer that follows
it, and the weights of all experts are numbered in one module.
"""

import re

from megatron_rl.models.hf_mapping.rules import Family, ParamMapping

_TO_LOCAL = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$"), r"self_attention.\1_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r"mlp.experts.local_experts.\3.\1.\2"),
)


def to_local_name(name: str) -> str:
    """Return the name of the same parameter in the local layer spec."""
    for pattern, replacement in _TO_LOCAL:
        name = pattern.sub(replacement, name)
    return name


def torch_dist_key(name: ParamMapping, layer: int, family: Family) -> str:
    """Return the key of a parameter in megatron-core's distributed checkpoints: one key per layer, experts stacked."""
    key = name.megatron.format(layer=layer, expert="{expert}")
    key = key.replace("mlp.experts.local_experts.{expert}.", "mlp.experts.experts.")
    if family.has_latent_attention:
        for part in ("q", "kv"):
            key = key.replace(f"{part}_layernorm.weight", f"linear_{part}_up_proj.layer_norm_weight")
    else:
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if layer in family.dense_layers:
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return key
