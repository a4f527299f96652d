"""Layers that megatron-core's local (not transformer-engine) spec needs for sequence parallelism and packed sequences.

Legend: T tokens of this rank's part of a row, N heads, D head dimension, B sequences of a bucket, S their longest.
"""

import dataclasses

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from megatron_rl.policy.experts import GroupedExperts, can_group
from megatron_rl.policy.rows import Bucket, PackedRow


class Norm:
    """Builds torch's RMSNorm or LayerNorm, marked so that megatron sums its gradient over sequence-parallel ranks.

    A class and not a function, because megatron-core calls what a spec names only if it is a class.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
        """Return the module."""
        kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        module = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in module.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)
        return module


class PackedAttention(nn.Module):
    """Causal attention over packed sequences, by torch's scaled dot product on buckets of similar length.

    Stands where megatron's DotProductAttention stands; that one takes neither packed rows nor context parallelism. With
    context parallelism keys and values are gathered, so each rank attends from its zig-zag chunks to whole sequences.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.context_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """Attend. query [T, N, D], key and value [T, groups, D] -> [T, N * D]; padding positions give zeros."""
        assert packed_seq_params is not None, "PackedAttention takes packed rows only"
        if self.context_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.context_group)
            value = gather_from_sequence_parallel_region(value, group=self.context_group)
        outputs = [self._attend(query, key, value, bucket) for bucket in packed_seq_params.buckets]
        nothing_1ND = query.new_zeros(1, query.shape[1], value.shape[-1])
        if not outputs:
            # An empty row must still run backward: every rank of a data- or expert-parallel group waits for it.
            nothing_1ND = nothing_1ND + 0 * (query.sum() + key.sum() + value.sum())
        flat = torch.cat([*outputs, nothing_1ND])
        return flat[packed_seq_params.output_index_T].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        query_BNSD = query[bucket.query_index_BS].transpose(1, 2)
        key_BNSD = key[bucket.key_index_BS].transpose(1, 2)
        value_BNSD = value[bucket.key_index_BS].transpose(1, 2)
        repeats = query_BNSD.shape[1] // key_BNSD.shape[1]
        if repeats > 1:
            key_BNSD = key_BNSD.repeat_interleave(repeats, dim=1)
            value_BNSD = value_BNSD.repeat_interleave(repeats, dim=1)
        attended = F.scaled_dot_product_attention(
            query_BNSD,
            key_BNSD,
            value_BNSD,
            attn_mask=bucket.mask_B1SS,
            is_causal=bucket.mask_B1SS is None,
            scale=self.scale,
        )
        return attended.transpose(1, 2).flatten(0, 1)


class WholeLinear(nn.Module):
    """A matrix that every tensor-parallel rank holds whole, applied to this rank's share of the sequence.

    transformer-engine's spec has it for the way down to the latents. The local spec cuts that matrix instead, and
    megatron-core 0.16 then loses a part of its gradient: the rotary part of the keys goes to the heads of all ranks,
    and what the other ranks' heads send back is dropped.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(weight)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return the product, and no bias: megatron's signature."""
        return F.linear(hidden, self.weight), None


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with whole matrices on the way down, as transformer-engine's spec builds it."""

    def __init__(self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, **kwargs: object) -> None:
        super().__init__(config, submodules, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)
        latent = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, latent)


def block_spec(
    config: TransformerConfig, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the spec of this rank's decoder block: transformer-engine's, or the local one with the layers above."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    if use_transformer_engine:
        return spec
    layers = [_local(layer, can_group(config)) for layer in spec.layer_specs]
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


def _experts(mlp: ModuleSpec) -> ModuleSpec:
    """Return the feed-forward part with grouped experts, if it has experts."""
    if mlp.module is not MoELayer:
        return mlp
    submodules = dataclasses.replace(mlp.submodules, experts=ModuleSpec(module=GroupedExperts))
    return dataclasses.replace(mlp, submodules=submodules)
