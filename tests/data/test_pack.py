"""Packed rows: every token exactly once, targets of the same sequence, within the budget."""

from dataclasses import replace

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

    packing = pack(batch.lengths_B, rules)
    rows = packing.rows(0, 1)

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


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), RULES, st.integers(1, 3))
def test_replicas_own_each_sequence_once_and_have_the_rows_of_the_whole(
    lengths: list[int], rules: RowRules, replicas: int
) -> None:
    batch = batch_of(lengths)
    rules = replace(rules, count_multiple=rules.count_multiple * replicas)
    packing = pack(batch.lengths_B, rules)
    whole = packing.rows(0, 1)

    owned = [packing.owned(replica, replicas) for replica in range(replicas)]

    assert sorted(torch.cat(owned).tolist()) == list(range(len(lengths)))
    for replica, owned_B in enumerate(owned):
        part = batch.select(owned_B)
        rows = packing.rows(replica, replicas)
        assert len(rows) == len(whole) // replicas
        for row, expected in zip(rows, whole[replica::replicas], strict=True):
            for mine, theirs in ((row.token_ids_T, expected.token_ids_T), (row.target_ids_T, expected.target_ids_T)):
                assert torch.equal(mine >= 0, theirs >= 0)
                assert torch.equal(part["input_ids_T"][mine[mine >= 0]], theirs[theirs >= 0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), RULES)
def test_rows_are_those_of_the_plain_rule(lengths: list[int], rules: RowRules) -> None:
    """Longest first, each to the first row with the fewest tokens; if any row is too long, more rows."""
    padded = [-(-length // rules.sequence_multiple) * rules.sequence_multiple for length in lengths]
    count = -(-sum(padded) // rules.tokens)
    count = -(-count // rules.count_multiple) * rules.count_multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        for index in sorted(range(len(padded)), key=lambda index: (-padded[index], index)):
            loads = [sum(padded[i] for i in b) for b in bins]
            bins[loads.index(min(loads))].append(index)
        if max(sum(padded[i] for i in b) for b in bins) <= rules.tokens:
            break
        count += rules.count_multiple

    found = pack(torch.tensor(lengths), replace(rules, one_sequence_per_row=False))

    assert [list(b) for b in found.bins] == [sorted(b) for b in bins]


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
        pack(torch.tensor([50]), RowRules(tokens=40))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), RULES, st.integers(2, 4))
def test_balanced_rows_are_the_same_rows_in_another_order_and_no_place_costs_more_than_the_one_before(
    lengths: list[int], rules: RowRules, replicas: int
) -> None:
    lengths_B = torch.tensor(lengths)
    rules = replace(rules, count_multiple=rules.count_multiple * replicas)
    plain, balanced = pack(lengths_B, rules), pack(lengths_B, replace(rules, balanced_replicas=replicas))
    assert sorted(balanced.bins) == sorted(plain.bins)
    assert balanced.length == plain.length
    costs = torch.tensor([int((balanced.padded_B[list(b)] ** 2).sum()) for b in balanced.bins]).view(-1, replicas)
    assert bool((costs[:-1].amin(1) >= costs[1:].amax(1)).all())
    # Each place adds at most the difference between its rows to the difference between the replicas.
    totals = costs.sum(0)
    assert int(totals.max() - totals.min()) <= int((costs.amax(1) - costs.amin(1)).max())


def test_balanced_replicas_have_even_costs_of_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.exp(7 + torch.randn(2048, generator=generator)).clamp(1, 16_384).long()

    def excess(balanced_replicas: int) -> float:
        """Return how much more attention than on average the costliest of 16 replicas has."""
        packing = pack(lengths_B, RowRules(16_384, count_multiple=16, balanced_replicas=balanced_replicas))
        costs = torch.tensor([float((packing.padded_B[list(b)] ** 2).sum()) for b in packing.bins]).view(-1, 16)
        return float(costs.sum(0).max() / costs.sum(0).mean()) - 1

    assert excess(16) < 0.02 < 0.05 < excess(1)
