"""The largest values of a mini-batch, found from sums of counts over its parts."""

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.data.types import Batch


def tokens_of(count: int, total=lambda values: values) -> Tokens:
    return Tokens.of(Batch(torch.tensor([count]), {"loss_mask_T": torch.ones(count, dtype=torch.bool)}), total)


@pytest.fixture
def values() -> Tensor:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1)
    values[:4] = torch.tensor([-torch.inf, 0.0, -0.0, torch.inf], dtype=torch.float64)
    return values


@pytest.mark.parametrize("count", [0, 1, 7, 150, 299, 300, 400])
def test_the_largest_are_those_at_or_above_the_smallest_of_them(values, count):
    found = tokens_of(300).largest(values, count)
    bound = values.sort(descending=True).values[min(count, 300) - 1] if count else torch.inf
    assert torch.equal(found, (values >= bound) if count else torch.zeros(300, dtype=torch.bool))


@pytest.mark.parametrize("count", [1, 7, 150, 299])
def test_parts_choose_what_the_whole_chooses(values, count):
    totals: list[Tensor] = []

    def record(counts: Tensor) -> Tensor:
        totals.append(counts)
        return counts

    whole = tokens_of(300, record).largest(values, count)
    for part in (slice(0, 0), slice(0, 120), slice(120, 300)):
        given = iter(totals)
        tokens = tokens_of(part.stop - part.start, lambda counts, given=given: next(given))
        assert torch.equal(tokens.largest(values[part], count), whole[part])
