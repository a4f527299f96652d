"""Percentiles over ranks are those of all values sorted in one place, bit for bit."""

import math
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms.correction import log_ratio_statistics
from megatron_rl.algorithms.percentiles import order_statistics

SIZES = st.one_of(st.floats(0), st.just(math.nan), st.sampled_from([0.0, 1.0, math.nextafter(1, 2), 5e-324]))


class NotKnownYetError(Exception):
    """The sum over the parts needs the counts of the other parts first."""


def over_parts(parts: list[Tensor], ranks: list[int]) -> list[list[float]]:
    """Return what every part computes, each digit with the sums of the parts' counts of that digit."""
    sums: list[Tensor] = []
    results: list[list[float]] = []
    while not results:
        asked: list[Tensor] = []
        for part in parts:
            known = iter(sums)

            def total(counts: Tensor, known: Iterator[Tensor] = known, asked: list[Tensor] = asked) -> Tensor:
                found = next(known, None)
                if found is None:
                    asked.append(counts)
                    raise NotKnownYetError
                return found

            with suppress(NotKnownYetError):
                results.append(order_statistics(part, ranks, total))
        if asked:
            sums.append(torch.stack(asked).sum(0))
    assert len(sums) == 4
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
