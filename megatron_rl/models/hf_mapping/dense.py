"""Dense decoders: Llama, Qwen2, Qwen2.5 and Qwen3. They differ in attention bias, norms and rotary scaling."""

from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping import blocks
from megatron_rl.models.hf_mapping.rules import Family, HFConfig


def llama(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``llama``."""
    blocks.reject(hf, attention_bias=True, mlp_bias=True)
    base, factor = llama_rope(hf)
    return _family(hf, base=base, factor=factor, bias=False, norm=False)


def qwen2(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``qwen2``: Qwen2 and Qwen2.5."""
    return _family(hf, base=blocks.unscaled_rope_base(hf), factor=None, bias=True, norm=False)


def qwen3(hf: HFConfig) -> Family:
    """Return the family of a ``config.json`` whose ``model_type`` is ``qwen3``."""
    blocks.reject(hf, attention_bias=True)
    return _family(hf, base=blocks.unscaled_rope_base(hf), factor=None, bias=False, norm=True)


def llama_rope(hf: HFConfig) -> tuple[float, float | None]:
    """Return base and scaling factor of Llama's rotary embedding; megatron-core hard-codes Llama 3's other constants.

    Raises:
        ConfigError: the scaling is not available in megatron-core.
    """
    rope = blocks.rope_settings(hf)
    if rope["rope_type"] != "llama3":
        return blocks.unscaled_rope_base(hf), None
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    for key, value in fixed.items():
        if rope.get(key) != value:
            raise ConfigError(
                f"{key} = {rope.get(key)} of config.json's llama3 rope is not supported; megatron-core only has {value}"
            )
    return float(str(rope["rope_theta"])), float(str(rope["factor"]))


def _family(hf: HFConfig, *, base: float, factor: float | None, bias: bool, norm: bool) -> Family:
    layers = blocks.all_layers(hf)
    tied = bool(hf.get("tie_word_embeddings", False))
    return Family(
        fields={**blocks.common_fields(hf), **blocks.attention_fields(hf, bias=bias, norm=norm)},
        mappings=(
            *blocks.embedding_and_head(hf),
            *blocks.layer_norms(hf),
            *blocks.attention(hf, bias=bias, norm=norm),
            *blocks.mlp(hf, hf["intermediate_size"], layers),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=base,
        rotary_factor=factor,
        tied=tied,
        dense_layers=frozenset(layers),
        passthrough=blocks.ROTARY_BUFFERS,
    )
