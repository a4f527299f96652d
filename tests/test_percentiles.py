"""Percentiles over ranks are those of all values sorted in one place, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms.correction import log_ratio_statistics
from megatron_rl.algorithms.percentiles import order_statistics

SIZES = st.one_of(st.floats(0), st.just(math.nan), st.sampled_from([0.0, 1.0, math.nextafter(1, 2), 5e-324]))


def over_parts(parts: list[Tensor], ranks: list[int]) -> list[list[float]]:
    """Return what every part computes: counts of a part are added to those that the other parts asked for."""
    sums: list[Tensor] = []
    for _ in range(4):  # each digit needs the sums of the digits before it
        summands: list[list[Tensor]] = []
        for part in parts:
            known, asked = iter(sums), list[Tensor]()

            def total(counts: Tensor, known=known, asked=asked) -> Tensor:
                asked.append(counts)
                return next(known, torch.full_like(counts, 100))

            order_statistics(part, ranks, total)
            summands.append(asked)
        sums = [torch.stack(terms).sum(0) for terms in zip(*summands, strict=True)]
    results = []
    for part in parts:
        known = iter(sums)
        results.append(order_statistics(part, ranks, lambda _, known=known: next(known)))
    return results


@settings(max_examples=30, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=30), st.data())
def test_order_statistics_are_exact_for_any_distribution_of_the_values(
    values: list[float], data: st.DataObject
) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    whole = torch.tensor(values, dtype=torch.float64).abs()
    parts = [whole[torch.tensor(owners) == part] for part in range(3)]

    found = over_parts(parts, ranks)

    expected = whole.sort().values[ranks]
    for each in found:
        assert torch.equal(torch.tensor(each, dtype=torch.float64).nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


def test_percentiles_of_log_ratios_are_elements_of_the_sorted_sizes() -> None:
    log_R = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, ordered = log_ratio_statistics(log_R), log_R.abs().sort().values.tolist()
    for percent in (50, 90, 99):
        assert found[f"abs_p{percent}"] == ordered[round(percent / 100 * 999)]
    assert found["abs_max"] == ordered[-1]
    assert found["abs_mean"] == pytest.approx(sum(ordered) / 1000, rel=1e-12)
    assert log_ratio_statistics(log_R[:0]) == {}
