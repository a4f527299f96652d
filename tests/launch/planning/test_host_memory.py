"""The host memory of token columns is what the columns of a run take."""

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.loss import prepare
from megatron_rl.algorithms.objectives import SSPO
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Columns, Group, Prompt, Response
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.launch.planning.host_memory import PREPARED_BYTES, SAMPLED_BYTES, SCORED_BYTES, host_columns
from megatron_rl.launch.planning.layout import ParallelLayout, layout_of
from megatron_rl.models.hf_mapping import family_of
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.rollout.collect import collect
from megatron_rl.tasks.base import Verdict

WORDS = Vocabulary(8, tuple(b"." for _ in range(8)))


def bytes_per_token(columns: Columns) -> int:
    tokens = [column for name, column in columns.items() if name.endswith("_T")]
    return sum(column.element_size() * column[0].numel() for column in tokens)


def test_the_bytes_of_each_kind_of_column_are_counted() -> None:
    response = Response("r", "p", 0, np.array([3, 4, 5]), -np.ones(3), "", "stop", ((0, 0, 3),))
    run = load(Run, [], ["model.path=x"]).run
    batch = collect([Group(Prompt("p", (1, 2), "", ""), (response,))], [[Verdict(1.0, True)]], run)
    assert bytes_per_token(batch.columns) == SAMPLED_BYTES
    scored = {"old_logprobs_T": torch.zeros(5), "old_entropies_T": torch.zeros(5)}
    assert bytes_per_token(scored) == SCORED_BYTES
    prepared = prepare(batch.add(scored), SSPO(), Correction(kind="tis"), WORDS)
    assert bytes_per_token(prepared) == PREPARED_BYTES


def qwen3_moe() -> Family:
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 100, "num_experts": 300, "num_experts_per_tok": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    widths = {"intermediate_size": 96, "moe_intermediate_size": 48, "rms_norm_eps": 1e-6}
    rest = {"norm_topk_prob": True, "max_position_embeddings": 256, "rope_theta": 1e4, "tie_word_embeddings": False}
    return family_of({"model_type": "qwen3_moe", **sizes, **heads, **widths, **rest})


def layout(ranks: int, **sizes: int) -> ParallelLayout:
    run = Run.model_validate({"model": {"path": "x"}, "parallel": sizes})
    return layout_of(run.parallel, ranks, {})


@pytest.mark.parametrize(("mode", "each"), [("none", 0), ("r3", 2 * 4 * 4 + 5), ("r2", 2 * 4 * 4)])
def test_own_columns_shrink_with_replicas_and_routes_with_stages(mode: str, each: int) -> None:
    run = Run.model_validate({"model": {"path": "x"}, "rollout": {"routing_replay": mode}})
    one, two = (host_columns(run, qwen3_moe(), layout(ranks, pipeline=2), 1000) for ranks in (2, 4))
    assert one.per_token == SAMPLED_BYTES + SCORED_BYTES + each  # four of eight layers
    assert one.local == 2 * two.local == 1000 * (one.per_token + PREPARED_BYTES)
    assert one.main == two.main
