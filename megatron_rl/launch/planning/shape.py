"""The sizes of a model that a layout has to divide."""

from dataclasses import dataclass

from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; without experts what is said of them is 0 or false.

    Attributes:
        positions: tokens of the longest sequence.
        has_dense_layers: some layers have an ordinary feed-forward network.
        biased_experts: experts have biases.
        sinks: attention has a sink for each head.
    """

    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    positions: int
    has_dense_layers: bool
    experts: int = 0
    expert_ffn: int = 0
    biased_experts: bool = False
    sinks: bool = False


def shape_of(family: Family) -> Shape:
    """Return the sizes of a model as its family read them from ``config.json``."""

    def size(name: str) -> int:
        return int(str(family.fields.get(name) or 0))

    return Shape(
        layers=family.num_layers,
        heads=size("num_attention_heads"),
        kv_heads=size("num_query_groups") or size("num_attention_heads"),
        ffn=size("ffn_hidden_size"),
        vocabulary=family.vocab_size,
        positions=family.max_position_embeddings,
        has_dense_layers=not family.num_experts or bool(family.dense_layers),
        experts=family.num_experts,
        expert_ffn=size("moe_ffn_hidden_size"),
        biased_experts=family.num_experts > 0 and bool(family.fields.get("add_bias_linear")),
        sinks=family.fields.get("softmax_type") == "learnable",
    )
