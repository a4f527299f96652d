"""Valid and invalid layouts; an invalid one is refused with a reason and a remedy."""

import re
from dataclasses import replace

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import check_layout, layout_of
from megatron_rl.launch.planning.model_sizes import ModelSizes, model_sizes
from megatron_rl.models.hf_mapping import family_of

HF = {
    "model_type": "qwen3_moe",
    "vocab_size": 1001,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
MOE = model_sizes(family_of(HF))
DENSE = model_sizes(family_of({**HF, "model_type": "qwen3"}))


def problems(*settings: str, sizes: ModelSizes = MOE, ranks: int | None = None, on_gloo: bool = True) -> list[str]:
    loaded = load(Run, [], ["model.path=x", *(f"parallel.{setting}" for setting in settings)])
    return check_layout(loaded, layout_of(loaded.run.parallel, ranks), sizes, on_gloo=on_gloo)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("tensor=2",),
        ("pipeline=2",),
        ("pipeline=2", "virtual_pipeline=3"),
        ("expert=2",),
        ("context=2",),
        ("ranks=2",),
        ("tensor=2", "expert=2"),
        ("pipeline=2", "tensor=2"),
        ("tensor=2", "expert=2", "pipeline=2", "context=2"),
        ("tensor=2", "expert_tensor=2"),
        ("tensor=2", "expert_tensor=1"),
        ("tensor=2", "expert=8", "ranks=16"),
    ],
)
def test_valid_layouts(settings):
    assert problems(*settings) == []


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        (("tensor=2", "expert=2"), 2),
        (("tensor=2", "expert=4"), 4),
        (("expert=4",), 4),
        (("tensor=2", "pipeline=3", "context=2", "expert=8"), 24),
        (("tensor=4",), 4),
        (("tensor=2", "ranks=8"), 8),
    ],
)
def test_the_default_number_of_ranks_is_the_fewest_that_the_axes_allow(settings, ranks):
    loaded = load(Run, [], ["model.path=x", *(f"parallel.{setting}" for setting in settings)])
    assert layout_of(loaded.run.parallel).ranks == ranks
    assert problems(*settings) == []


def test_axes_multiply_to_the_ranks():
    layout = layout_of(load(Run, [], ["model.path=x", "parallel.tensor=2", "parallel.expert=4"]).run.parallel, 16)
    assert (layout.data, layout.expert_data, layout.expert_tensor, layout.sequence) == (8, 4, 1, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("tensor=2", "ranks=3"),
            ["tensor * pipeline * context = 2", "use 2 or 4 ranks", "command line: parallel.ranks=3"],
        ),
        (("expert=4", "ranks=6"), ["expert * expert_tensor * pipeline = 4", "use 4 or 8 ranks"]),
        (("tensor=3", "expert=3", "ranks=3"), ["parallel.tensor = 3", "attention heads, 8; write 2 or 4"]),
        (("tensor=8",), ["key-value heads, 4; write 4"]),
        (("expert=3",), ["parallel.expert = 3", "experts, 16; write 2 or 4"]),
        (("expert_tensor=3",), ["expert width, 64; write 2 or 4"]),
        (("pipeline=5",), ["is 5 and does not divide the model's 12 layers; make the product 4 or 6"]),
        (("virtual_pipeline=2",), ["parallel.virtual_pipeline = 2", "needs a pipeline"]),
        (("sequence=true",), ["parallel.sequence = True", "one rank; leave it out"]),
        (("tensor=2", "sequence=false"), ["only with sequence parallelism; leave parallel.sequence out"]),
        (("tensor=2", "expert=2", "expert_tensor=2"), ["uneven", "gloo", "write expert_tensor = 1 or expert = 1"]),
    ],
)
def test_invalid_layouts_are_refused_with_reason_and_remedy(settings, words):
    output = "\n".join(problems(*settings))
    for word in words:
        assert word in output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("parallel.pipeline=5", "last=4"), []),
        (("parallel.pipeline=3", "first=3", "last=3"), []),
        (("parallel.pipeline=2", "first=5", "last=7"), []),
        (("parallel.pipeline=4", "last=4"), ["last_pipeline_stage = 4", "8 of the model's 12 layers", "the 3 other"]),
        (("parallel.pipeline=2", "first=5", "last=5"), ["2 of the model's 12 layers are left for the 0 other"]),
        (("parallel.pipeline=3", "first=12"), ["0 of the model's 12 layers are left", "at least one"]),
        (("first=4",), ["set parallel.pipeline above 1"]),
        (("parallel.pipeline=2", "first=0"), ["first_pipeline_stage = 0", "whole number above 0"]),
        (("parallel.pipeline=2", "first=true"), ["whole number above 0"]),
        (("parallel.pipeline=3", "parallel.virtual_pipeline=2", "last=4"), ["is not supported; leave one out"]),
    ],
)
def test_the_first_or_last_stage_may_have_another_number_of_layers(settings, words):
    fields = {end: f"model.megatron.num_layers_in_{end}_pipeline_stage" for end in ("first", "last")}
    given = [f"{fields.get(key, key)}={value}" for key, value in (setting.split("=") for setting in settings)]
    loaded = load(Run, [], ["model.path=x", *given])
    layout = layout_of(loaded.run.parallel, None, loaded.run.model.megatron)
    output = check_layout(loaded, layout, MOE, on_gloo=True)
    assert bool(output) == bool(words)
    for word in words:
        assert word in "\n".join(output)


def test_all_problems_are_reported_together():
    assert len(problems("tensor=3", "pipeline=5", "expert=5", "ranks=7")) == 6


def test_experts_in_tensor_shards_work_with_nccl():
    assert problems("tensor=2", "expert=2", "expert_tensor=2", on_gloo=False) == []


def test_a_dense_model_has_no_expert_axes_and_shards_its_feed_forward():
    assert problems("tensor=2", sizes=DENSE) == []
    assert "no experts" in problems("expert=2", sizes=DENSE)[0]
    odd = replace(DENSE, ffn=127)
    assert "feed-forward width, 127" in problems("tensor=2", sizes=odd)[0]


def test_launched_ranks_override_the_config():
    assert problems("tensor=2", ranks=4) == []
    assert problems("tensor=2", ranks=5)[0].startswith("5 ranks cannot be divided")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("tensor=2",), r"expert_tensor = 2 .*biases.*write expert_tensor = 1"),
        (("tensor=4", "expert=4", "context=2"), r"context = 2.*sinks.*write 1"),
    ],
)
def test_unsupported_transformer_engine_layouts_are_refused_only_on_gpus(settings, words):
    odd = replace(MOE, experts_have_bias=True, attention_sinks=True)
    assert problems(*settings, sizes=odd) == []
    (problem,) = problems(*settings, sizes=odd, on_gloo=False)
    assert re.search(words, problem)
    assert problems("tensor=2", "expert=4", "pipeline=2", sizes=odd, on_gloo=False) == []
