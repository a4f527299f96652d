"""Sharding rules are exact inverses, and families read config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.errors import ConfigError
from megatron_rl.models.checkpoint_folders import copy_companions, open_checkpoint
from megatron_rl.models.hf_mapping import blocks, family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import (
    FuseGateUp,
    FuseInterleavedGateUp,
    FuseQKV,
    Replicate,
    Shard,
    ShardRule,
    ShardVocabulary,
)

SIZES = st.sampled_from([1, 2, 4])


def survives(layout: ShardRule, parts: list[torch.Tensor], size: int) -> None:
    shards = [layout.shard(parts, rank, size) for rank in range(size)]
    assert len({tuple(shard.shape) for shard in shards}) == 1
    for before, after in zip(parts, layout.merge(shards), strict=True):
        assert torch.equal(before, after)


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_every_rule_is_undone_by_its_inverse(size: int, groups: int, heads: int, head_dim: int) -> None:
    groups *= size
    hidden = 4 * size
    query = torch.randn(groups * heads * head_dim, hidden)
    key, value = torch.randn(groups * head_dim, hidden), torch.randn(groups * head_dim, hidden)
    survives(FuseQKV(groups * heads, groups, head_dim), [query, key, value], size)
    survives(FuseGateUp(), [query[: 4 * size], query[: 4 * size] + 1], size) if len(query) >= 4 * size else None
    survives(FuseInterleavedGateUp(), [torch.randn(5, 2 * hidden)], size)
    survives(FuseInterleavedGateUp(), [torch.randn(2 * hidden)], size)
    survives(Shard(1, transposed=True), [torch.randn(hidden, 3)], size)
    survives(Shard(0), [torch.randn(hidden, 3)], size)
    survives(Shard(1), [torch.randn(3, hidden)], size)
    survives(Replicate(), [torch.randn(5)], size)


@given(SIZES, st.integers(1, 30))
def test_vocabulary_rows_are_padded_and_cut_again(size: int, rows: int) -> None:
    survives(ShardVocabulary(rows), [torch.randn(rows, 3)], size)


def test_the_table_accounts_for_every_tensor_of_the_demo_model() -> None:
    folder = Path(__file__).parents[2] / "configs" / "demo-model"
    family = family_of(read_hf_config(folder))
    open_checkpoint(folder, family).check(family)


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))

    with pytest.raises(ConfigError, match=r"'bert'.*qwen3_moe"):
        family_of(read_hf_config(tmp_path))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key 'num_experts'"):
        family_of({"model_type": "qwen3_moe"})


def yarn(**changes: object) -> dict[str, Any]:
    """Return a config.json's rotary settings as fields."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4, **changes}
    return blocks.yarn_fields({"model_type": "gpt_oss", "rope_parameters": rope})


@pytest.mark.parametrize(
    "changes",
    [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"mscale": 0.7}, {"attention_factor": 0.83}, {"factor": 1.0}],
    ids=["plain", "two scales", "one scale", "its own", "not stretched"],
)
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_has_the_angles_and_the_factor_that_transformers_gives(changes, truncate, monkeypatch) -> None:
    fields = yarn(truncate=truncate, **changes)
    monkeypatch.setattr(torch.cuda, "current_device", torch.cpu.current_device)  # as parallel.cpu does
    rope = YarnRotaryEmbedding(
        16,
        rotary_base=10000,
        use_cpu_initialization=True,
        scaling_factor=fields["yarn_rotary_scaling_factor"],
        original_max_position_embeddings=fields["yarn_original_max_position_embeddings"],
        beta_fast=fields["yarn_beta_fast"],
        beta_slow=fields["yarn_beta_slow"],
        mscale=fields["yarn_mscale"],
        mscale_all_dim=fields["yarn_mscale_all_dim"],
        correction_range_round_to_int=fields["yarn_correction_range_round_to_int"],
    )
    angles, factor = rope.get_emb(2)
    given = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
    config = GptOssConfig(head_dim=16, rope_parameters={**given, "truncate": truncate, **changes})
    expected, scaling = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(angles[1, 0, 0, :8], expected)
    assert factor == pytest.approx(scaling)


def test_an_attention_factor_without_stretching_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention_factor 0\.5.*factor above 1; factor is 1\.0"):
        yarn(attention_factor=0.5, factor=1.0)


@pytest.mark.parametrize("theta", [{"rope_theta": 1e6}, {}])
def test_old_and_new_rotary_settings_may_stand_side_by_side_if_they_agree(theta) -> None:
    settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **theta}
    old = {"type": settings["rope_type"], **{key: settings[key] for key in settings if key != "rope_type"}}

    assert blocks.rope_settings({"rope_parameters": settings, "rope_scaling": old}) == {"rope_theta": 1e4, **settings}


@pytest.mark.parametrize(
    "old", [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, {"rope_theta": 5e5}]
)
def test_rotary_settings_that_engines_read_differently_are_refused(old) -> None:
    hf = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": old}

    with pytest.raises(ConfigError, match=r"rope_parameters = .* and rope_scaling = .*delete the wrong one"):
        blocks.rope_settings(hf)


def test_no_number_of_key_value_heads_means_one_per_attention_head() -> None:
    assert blocks.kv_heads({"num_attention_heads": 8, "num_key_value_heads": None}) == 8


def test_everything_but_weights_is_copied_with_a_checkpoint(tmp_path: Path) -> None:
    companions = ["config.json", "tokenization_x.py", "tiktoken.model", "a.tiktoken", "LICENSE", "chat_template.jinja"]
    weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.gguf", ".gitattributes"]
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in [*companions, *weights, "additional_chat_templates/tool.jinja", "onnx/model.onnx"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")

    copy_companions(source, target)

    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {*companions, "additional_chat_templates/tool.jinja"}
