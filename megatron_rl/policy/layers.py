"""Layer specs: transformer-engine's, or the local one extended for packed sequences and sequence parallelism."""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from megatron_rl.policy.attention import PackedAttention
from megatron_rl.policy.backends import Backends
from megatron_rl.policy.experts import GroupedExperts, can_group


class Norm:
    """Builds torch's RMSNorm or LayerNorm, marked so that gradients are summed over sequence-parallel ranks.

    This is a class because megatron-core only instantiates spec entries that are classes.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
        """Return the module."""
        kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in module.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)
        return module


class ReplicatedLinear(nn.Module):
    """A linear layer that is replicated on tensor-parallel ranks and applied to this rank's part of the sequence.

    transformer-engine's spec uses one for latent attention's down projections. The local spec shards them, and
    megatron-core 0.16 then loses a part of the gradient: the rotary part of the keys feeds the heads of all ranks, and
    the gradient from other ranks' heads is dropped.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(weight)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return (hidden weight^T, None); megatron-core expects a pair with a bias."""
        return F.linear(hidden, self.weight), None


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention with replicated down projections, as in transformer-engine's spec."""

    def __init__(self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, **kwargs: object) -> None:
        super().__init__(config, submodules, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        latent = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, latent)


def block_spec(config: TransformerConfig, paths: Backends, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the spec of this rank's decoder block."""
    spec = get_gpt_decoder_block_spec(config, paths.engine, normalization=config.normalization, vp_stage=vp_stage)
    if paths.engine:
        return spec
    layers = [_local(layer, paths.grouped and can_group(config)) for layer in spec.layer_specs]
    return dataclasses.replace(spec, layer_specs=layers, layer_norm=Norm)


def _local(spec: ModuleSpec, grouped: bool) -> ModuleSpec:
    attention = spec.submodules.self_attention
    inner = dataclasses.replace(attention.submodules, core_attention=PackedAttention)
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if "Norm" in getattr(getattr(inner, name, None), "__name__", ""):
            inner = dataclasses.replace(inner, **{name: Norm})
    module = LatentAttention if attention.module is MLASelfAttention else attention.module
    submodules = dataclasses.replace(
        spec.submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=dataclasses.replace(attention, module=module, submodules=inner),
        mlp=_experts(spec.submodules.mlp) if grouped else spec.submodules.mlp,
    )
    return dataclasses.replace(spec, submodules=submodules)


def _experts(mlp: ModuleSpec | partial[nn.Module]) -> ModuleSpec | partial[nn.Module]:
    """Return the feed-forward spec, with ``GroupedExperts`` if the layer has experts."""
    if isinstance(mlp, partial):  # megatron-core 0.17 and later build layers from functions
        if mlp.func is not MoELayer:
            return mlp
        return partial(mlp, submodules=dataclasses.replace(mlp.keywords["submodules"], experts=GroupedExperts))
    if mlp.module is not MoELayer:
        return mlp
    submodules = dataclasses.replace(mlp.submodules, experts=ModuleSpec(module=GroupedExperts))
    return dataclasses.replace(mlp, submodules=submodules)
