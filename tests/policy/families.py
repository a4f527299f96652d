"""A tiny random checkpoint of every family, as transformers makes and saves it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 18,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 80, "norm_topk_prob": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 8, "head_dim": 16, "mlp_only_layers": [1]}),
    "glm4_moe": (
        "glm4_moe",
        {
            **EXPERTS,
            "n_routed_experts": 8,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": {**YARN, "truncate": False, "mscale": None, "mscale_all_dim": None},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**EXPERTS, **LATENT, "q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **EXPERTS,
            **LATENT,
            "q_lora_rank": 40,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "rope_parameters": YARN,
        },
    ),
    "moonlight": (
        "deepseek_v3",
        {**EXPERTS, **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
    ),
}
"""Name in tests and tables -> (model_type, what its config has besides)."""

MIXTURES = [name for name, (_, settings) in MODELS.items() if "num_experts_per_tok" in settings]


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model whose routers and softmaxes are decided; the same values in every dtype."""
    torch.manual_seed(0)
    model_type, settings = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.08 * noise)
        for tensor_name, buffer in model.named_buffers():
            if tensor_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model.to(dtype)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, *, fused: bool = False) -> Path:
    """Write the model, with each expert apart or with the experts of a layer fused, and return its folder."""
    make(name, dtype).save_pretrained(folder, save_original_format=not fused)
    return folder
