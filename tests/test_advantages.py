import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms.advantages import advantages, dr, gdpo, overlong_penalty, rloo, zero_variance, zscore

REWARDS = st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.0])


@st.composite
def graded(draw):
    """(reward, group, verified) of each response."""
    return draw(st.lists(st.tuples(REWARDS, st.integers(3, 6), st.booleans()), max_size=12))


def columns(rows):
    rewards, groups, verified = zip(*rows, strict=True) if rows else ((), (), ())
    unverified_is_garbage = [r if v else float("nan") for r, v in zip(rewards, verified, strict=True)]
    return torch.tensor(unverified_is_garbage), torch.tensor(groups, dtype=torch.int64), torch.tensor(verified)


def slow(rows, formula):
    """The formula applied to one response at a time: reward, rewards of its verified group, of the others in it."""
    expected = []
    for i, (reward, group, verified) in enumerate(rows):
        others = [r for k, (r, g, v) in enumerate(rows) if g == group and v and k != i]
        expected.append(formula(reward, [reward, *others], others) if verified else 0.0)
    return torch.tensor(expected, dtype=torch.float64)


def zscore_of(reward, everyone, others):
    deviation = statistics.stdev(everyone) if len(set(everyone)) > 1 else 0.0
    return (reward - statistics.fmean(everyone)) / (deviation + 1e-6) if deviation else 0.0


FORMULAS = {
    "zscore": zscore_of,
    "dr": lambda reward, everyone, others: reward - statistics.fmean(everyone),
    "rloo": lambda reward, everyone, others: reward - statistics.fmean(others) if others else 0.0,
}


@pytest.mark.parametrize("kind", FORMULAS)
@given(rows=graded())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kinds_equal_the_formula(kind, rows):
    # float32 rewards: 0.1 is off by 1.5e-9, which 1 / std turns into 1e-7 at most.
    torch.testing.assert_close(advantages(kind, *columns(rows)), slow(rows, FORMULAS[kind]), rtol=1e-6, atol=1e-6)


def test_equal_rewards_give_exactly_zero():
    rewards, groups = torch.full((7,), 0.1, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    for function in (zscore, dr, rloo):
        assert function(rewards, groups).tolist() == [0.0] * 7
    assert zero_variance(rewards, groups).all()


def test_unverified_responses_leave_mean_and_deviation():
    rewards, groups = torch.tensor([1.0, 0.0, 9.0]), torch.zeros(3, dtype=torch.int64)
    verified = torch.tensor([True, True, False])
    expected = 0.5 / (0.5**0.5 + 1e-6)
    assert zscore(rewards, groups, verified).tolist() == pytest.approx([expected, -expected, 0.0], abs=1e-12)


def test_zero_variance_looks_at_verified_rewards_only():
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 3.0]), torch.tensor([5, 5, 5, 7, 7, 9])
    verified = torch.tensor([True, True, False, True, True, True])
    assert zero_variance(rewards, groups, verified).tolist() == [True, True, True, False, False, True]


def test_gdpo_whitens_the_weighted_sum_of_z_scores():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0], [1.0, 2.0]], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    z = 0.5**0.5
    sums = torch.tensor([z, -z, -z + 2 * z, z - 2 * z], dtype=torch.float64)
    expected = (sums - sums.mean()) / sums.std()
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # The 1e-6 in each deviation.
    torch.testing.assert_close(gdpo(rewards, groups, weights), expected, rtol=0, atol=1e-5)
    unweighted = gdpo(rewards, groups)
    assert unweighted.mean().item() == pytest.approx(0, abs=1e-12)


def test_overlong_penalty_is_zero_then_linear_then_minus_one():
    lengths = torch.tensor([0, 80, 90, 100, 130])
    assert overlong_penalty(lengths, max_tokens=100, buffer_tokens=20).tolist() == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer_tokens = 0"):
        overlong_penalty(lengths, 100, 0)
