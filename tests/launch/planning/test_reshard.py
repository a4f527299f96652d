"""Plans of direct pushes: executed on small models, every byte of every engine rank arrives once, and is the right one.

The engine's parameters are made a second time here, from whole tensors, as SGLang's loaders make them.
"""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.launch.planning.layout import layout_of
from megatron_rl.launch.planning.reshard import trainer_layout
from megatron_rl.models.hf_mapping import family_of
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.models.reshard.boxes import matrix_shape
from megatron_rl.models.reshard.layouts import EngineLayout, TrainerLayout
from megatron_rl.models.reshard.plan import reshard_plan
from megatron_rl.prove.layouts import DEFAULT, layout_run

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"
COMMON: dict[str, Any] = {
    "vocab_size": 150,  # three ranks' rows of padding
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "head_dim": 4,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 4,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
    },
}
QWEN3_30B = COMMON | {
    **MODELS["qwen3_moe"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
}
LAYOUTS = sorted({text for text in DEFAULT if "dtype" not in text})
ENGINES = [(t, e) for t, e in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)) if t % e == 0]


@cache
def family(name: str, layers: int) -> Family:
    return family_of(COMMON | MODELS[name] | {"num_hidden_layers": layers})


def trainer_of(text: str, layers: int) -> TrainerLayout:
    run = layout_run(load(Run, [str(DEMO)], []).run, text)
    return trainer_layout(layout_of(run.run.parallel, run.ranks), layers)


def whole_tensors(model: Family) -> dict[str, Tensor]:
    """Return tensors in which every element has another number."""
    tensors, first = dict[str, Tensor](), 0
    for name, shape in model.hf_shapes().items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count).view(shape)
        first += count
    return tensors


def trainer_parameters(
    model: Family, layout: TrainerLayout, tensors: dict[str, Tensor]
) -> dict[tuple[int, str], Tensor]:
    """Return every rank's shards, in megatron-core's order of ranks, as matrices."""
    found: dict[tuple[int, str], Tensor] = {}
    per_stage = layout.ranks // layout.pipeline
    for mapping, layer, expert in model.parameters():
        parts = [tensors[name] for name in mapping.hf_names(layer, expert)]
        if "{layer}" in mapping.megatron:
            stage = layout.stage_of_layer[layer]
        else:
            stage = 0 if "embedding" in mapping.megatron else layout.pipeline - 1
        for place in range(per_stage):
            if mapping.is_expert:
                index, size = place % layout.expert_tensor, layout.expert_tensor
                if expert * layout.expert // mapping.experts != place // layout.expert_tensor % layout.expert:
                    continue
            else:
                index, size = place % layout.tensor, layout.tensor
            shard = mapping.rule.shard(parts, index, size)
            found[stage * per_stage + place, mapping.megatron_name(layer, expert)] = shard.reshape(
                matrix_shape(shard.shape)
            )
    return found


def engine_parameters(
    tensors: dict[str, Tensor], engine: EngineLayout, experts: int, groups: int
) -> dict[tuple[int, str], Tensor]:
    """Return every engine rank's parameters, as matrices; padding is -1."""
    found: dict[tuple[int, str], Tensor] = {}
    for rank, (name, tensor) in itertools.product(range(engine.tensor), tensors.items()):
        stem = name.rsplit(".", 2)[0]
        if ".experts." in name:
            prefix = name[: name.index(".experts.")] + ".experts."
            found |= {
                (rank, prefix + end): t for end, t in rank_experts(tensors, prefix, rank, engine, experts).items()
            }
        elif name.endswith("q_proj.weight"):
            found[rank, f"{stem}.qkv_proj.weight"] = rank_attention(tensors, stem, rank, engine.tensor, groups)
        elif name.endswith("gate_proj.weight"):
            halves = [tensors[f"{stem}.{half}_proj.weight"] for half in ("gate", "up")]
            found[rank, f"{stem}.gate_up_proj.weight"] = torch.cat([t.chunk(engine.tensor)[rank] for t in halves])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            found[rank, name] = unfused(name, tensor, rank, engine.tensor)
    return found


def rank_experts(
    tensors: dict[str, Tensor], prefix: str, rank: int, engine: EngineLayout, experts: int
) -> dict[str, Tensor]:
    shards, per_rank = engine.tensor // engine.expert, experts // engine.expert
    first, index = rank // shards * per_rank, rank % shards
    names = [f"{prefix}{expert}." for expert in range(first, first + per_rank)]
    w2 = [tensors[name + "down_proj.weight"].chunk(shards, 1)[index] for name in names]
    w13 = [tensors[f"{name}{half}_proj.weight"].chunk(shards)[index] for name in names for half in ("gate", "up")]
    return {"w2_weight": torch.cat(w2), "w13_weight": torch.cat(w13)}


def rank_attention(tensors: dict[str, Tensor], stem: str, rank: int, size: int, groups: int) -> Tensor:
    query, *others = (tensors[f"{stem}.{part}_proj.weight"] for part in "qkv")
    copies = max(size // groups, 1)
    repeated = [t.unflatten(0, (groups, -1)).repeat_interleave(copies, 0).flatten(0, 1) for t in others]
    return torch.cat([t.chunk(size)[rank] for t in (query, *repeated)])


def unfused(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return tensor.chunk(size, 1)[rank]
    if name.endswith(("q_b_proj.weight", "kv_b_proj.weight")):
        return tensor.chunk(size)[rank]
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        padding = torch.full((-len(tensor) % 64, tensor.shape[1]), -1)
        return torch.cat([tensor, padding]).chunk(size)[rank]
    return tensor.reshape(matrix_shape(tensor.shape))


def check_plan(name: str, trainer: TrainerLayout, engine: EngineLayout) -> None:
    model = family(name, len(trainer.stage_of_layer))
    tensors = whole_tensors(model)
    shards = trainer_parameters(model, trainer, tensors)
    expected = engine_parameters(tensors, engine, 8, MODELS[name]["num_key_value_heads"])
    arrived = {key: torch.full_like(tensor, -1) for key, tensor in expected.items()}
    times = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    plan = reshard_plan(model, trainer, engine)
    for transfer in plan.transfers:
        source, target = transfer.source, transfer.target
        height, width = source.rows[1] - source.rows[0], source.columns[1] - source.columns[0]
        taken = shards[source.ranks[0], source.parameter][
            source.row : source.row + height, source.column : source.column + width
        ]
        assert taken.shape == (height, width)
        place = slice(target.row, target.row + height), slice(target.column, target.column + width)
        arrived[target.ranks[0], target.parameter][place] = taken
        times[target.ranks[0], target.parameter][place] += 1
    for key, tensor in expected.items():
        assert torch.equal(arrived[key], tensor), key
        assert torch.equal(times[key], (tensor >= 0).long()), key
    assert sum(plan.sent) == sum(plan.received) == sum(int((tensor >= 0).sum()) for tensor in expected.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_of_every_engine_rank_arrives_once(layout: str) -> None:
    trainer = trainer_of(layout, 3 if "pipeline=3" in layout else 4)
    for tensor, expert in ENGINES:
        check_plan("qwen3_moe", trainer, EngineLayout(tensor, expert))


@pytest.mark.parametrize(
    "layout", ["tokens=128", "tensor=2,expert=2,pipeline=2,tokens=128", "tensor=2,expert=2,data=2"]
)
def test_latent_attention_and_shared_experts_arrive_too(layout: str) -> None:
    for tensor, expert in ENGINES:
        check_plan("deepseek_v3", trainer_of(layout, 4), EngineLayout(tensor, expert))


@pytest.mark.parametrize("layout", [text for text in LAYOUTS if "pipeline=3" not in text])
def test_ranks_of_a_stage_send_the_same_within_5_percent(layout: str) -> None:
    model = family_of(QWEN3_30B | {"num_hidden_layers": 4, "num_experts": 16})
    trainer = trainer_of(layout, 4)
    for tensor, expert in ENGINES:
        plan = reshard_plan(model, trainer, EngineLayout(tensor, expert))
        assert plan.imbalance(trainer.ranks_per_stage) <= 1.05, (tensor, expert)
        assert max(plan.received) * tensor <= 1.05 * sum(plan.received), (tensor, expert)


def test_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="3 parts of experts"):
        reshard_plan(family("qwen3_moe", 4), trainer_of("tensor=2", 4), EngineLayout(3, 3))
    with pytest.raises(DataError, match="cannot be divided by 5 ranks"):
        reshard_plan(family("qwen3_moe", 4), trainer_of("tensor=2", 4), EngineLayout(5, 1))
