"""gpt-oss's sizes, for the plan alone: attention with biases, sinks and windows, experts with biases."""

import torch.nn.functional as F

from megatron_rl.policy.names import blocks
from megatron_rl.policy.names.rules import Family, GateUp, HFConfig, Name, Split, Whole


def family(hf: HFConfig) -> Family:
    """Return the sizes of a ``config.json`` whose ``model_type`` is ``gpt_oss``: enough to plan, not to load."""
    layers, hidden = blocks.all_layers(hf), hf["hidden_size"]
    heads, width, count = hf["num_attention_heads"], hf["intermediate_size"], hf["num_local_experts"]
    inside = blocks.LAYER + "mlp.experts.local_experts.{expert}."

    def own(megatron: str, shape: tuple[int, ...], dim: int | None) -> Name:
        layout = Whole() if dim is None else Split(dim)
        return Name(blocks.LAYER + megatron, (blocks.HF + megatron,), layout, (shape,), layers)

    return Family(
        fields={
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "ffn_hidden_size": width,
            "activation_func": F.silu,
            "window_size": hf.get("sliding_window") or 0,
            **blocks.attention_fields(hf, bias=True, norm=False),
            **blocks.sparse_fields(hf, layers, count=count, width=width),
        },
        names=(
            *blocks.ends(hf),
            *blocks.norms(hf),
            *blocks.attention(hf, bias=True, norm=False),
            own("self_attention.linear_proj.bias", (hidden,), None),
            own("self_attention.core_attention.softmax_offset", (heads,), 0),
            *blocks.router(hf, count, layers),
            own("mlp.router.bias", (count,), None),
            *blocks.experts(hf, count, width, layers),
            Name(inside + "linear_fc1.bias", ("gate_up.bias",), GateUp(), ((2 * width,),), layers, count),
            Name(inside + "linear_fc2.bias", ("down.bias",), Whole(), ((hidden,),), layers, count),
        ),
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=float(str(blocks.rope_of(hf)["rope_theta"])),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )
