"""Names of transformer-engine's layers, which checkpoints of megatron-core have, as names of the local layers.

transformer-engine fuses a norm into the matrix product after it, and numbers experts' weights in one module.
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
    """Return the name that the same tensor has in the local layer spec."""
    for pattern, replacement in _TO_LOCAL:
        name = pattern.sub(replacement, name)
    return name


def torch_dist_key(name: ParamMapping, layer: int, family: Family) -> str:
    """Return the key of a tensor in megatron-core's distributed checkpoints, with layers apart and experts stacked."""
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
