"""Sharding rules cut and join without changing a bit."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError
from megatron_rl.policy.folders import open_source
from megatron_rl.policy.names import family_of, read_hf_config
from megatron_rl.policy.names.rules import QKV, GateUp, Layout, Split, VocabularyRows, Whole

SIZES = st.sampled_from([1, 2, 4])


def survives(layout: Layout, parts: list[torch.Tensor], size: int) -> None:
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
    survives(QKV(groups * heads, groups, head_dim), [query, key, value], size)
    survives(GateUp(), [query[: 4 * size], query[: 4 * size] + 1], size) if len(query) >= 4 * size else None
    survives(Split(0), [torch.randn(hidden, 3)], size)
    survives(Split(1), [torch.randn(3, hidden)], size)
    survives(Whole(), [torch.randn(5)], size)


@given(SIZES, st.integers(1, 30))
def test_vocabulary_rows_are_padded_and_cut_again(size: int, rows: int) -> None:
    survives(VocabularyRows(rows), [torch.randn(rows, 3)], size)


def test_the_table_accounts_for_every_tensor_of_the_demo_model() -> None:
    folder = Path(__file__).parents[2] / "configs" / "demo-model"
    family = family_of(read_hf_config(folder))
    open_source(folder, family).check(family)


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))

    with pytest.raises(ConfigError, match=r"'bert'.*qwen3_moe"):
        family_of(read_hf_config(tmp_path))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key 'num_experts'"):
        family_of({"model_type": "qwen3_moe"})
