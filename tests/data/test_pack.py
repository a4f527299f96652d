"""Packed rows: every token exactly once, targets of the same sequence, within the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.pack import RowRules, pack
from megatron_rl.data.types import Batch
from megatron_rl.errors import ConfigError
from megatron_rl.policy.rows import zigzag


def batch_of(lengths: list[int]) -> Batch:
    total = sum(lengths)
    columns = {"input_ids_T": torch.arange(total), "loss_mask_T": torch.ones(total, dtype=torch.bool)}
    return Batch(torch.tensor(lengths), columns)


RULES = st.builds(
    RowRules,
    tokens=st.integers(32, 96),
    sequence_multiple=st.sampled_from([1, 4, 8]),
    row_multiple=st.sampled_from([8, 16]),
    count_multiple=st.integers(1, 4),
    one_sequence_per_row=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), RULES)
def test_rows_hold_every_token_once_and_predict_within_sequences(lengths: list[int], rules: RowRules) -> None:
    batch = batch_of(lengths)

    rows = pack(batch, rules)

    assert len(rows) % rules.count_multiple == 0
    assert len({row.length for row in rows}) == 1
    assert rows[0].length % rules.row_multiple == 0
    assert rows[0].length < rules.tokens + rules.row_multiple
    ids = torch.cat([row.token_ids_T for row in rows])
    assert sorted(ids[ids >= 0].tolist()) == list(range(sum(lengths)))
    firsts = set(batch.starts_B.tolist())
    targets = torch.cat([row.target_ids_T for row in rows])
    predicting = targets >= 0
    assert torch.equal(targets[predicting], ids[predicting] + 1)
    assert sorted(targets[predicting].tolist()) == [token for token in range(sum(lengths)) if token not in firsts]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sampled_from([1, 2, 4]))
def test_zigzag_chunks_cover_each_sequence_once(chunks: list[int], size: int) -> None:
    lengths = torch.tensor(chunks) * 2 * size

    parts = [zigzag(lengths, rank, size) for rank in range(size)]

    assert sorted(torch.cat(parts).tolist()) == list(range(int(lengths.sum())))
    assert len({len(part) for part in parts}) == 1


def test_zigzag_pairs_an_early_chunk_with_a_late_one() -> None:
    assert zigzag(torch.tensor([8]), 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag(torch.tensor([8]), 1, 2).tolist() == [2, 3, 4, 5]


def test_a_sequence_that_fits_no_row_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens_per_microbatch to at least 50"):
        pack(batch_of([50]), RowRules(tokens=40))
