import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms.advantages import (
    advantages,
    dr,
    gdpo,
    maxrl,
    overlong_penalty,
    passk,
    rloo,
    zero_variance,
    zscore,
)
from megatron_rl.algorithms.arm import arm, arm_alphas, confidence
from megatron_rl.algorithms.pruning import drop_probabilities, pruned_weights

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


def test_known_advantages_of_maxrl():
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    assert maxrl(rewards, groups).tolist() == pytest.approx([0.666667, -1, -1, 0.666667, 0.666667], abs=5.1e-7)
    assert maxrl(torch.zeros(3), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]
    assert maxrl(torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]


def test_passk_rewards_the_gain_of_the_maximum():
    rewards = torch.tensor([0.1, 0.9, 0.4, 1.0, 1.0, 0.3, 5.0])
    groups, verified = torch.tensor([0, 0, 0, 1, 1, 2, 0]), torch.tensor([True] * 6 + [False])
    assert passk(rewards, groups, verified).tolist() == pytest.approx([0, 0.5, 0, 0, 0, 0, 0], abs=1e-7)


@given(rows=graded())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batch_deviations_equal_the_formula(rows):
    known = [reward for reward, _, verified in rows if verified]
    mean, deviation = statistics.fmean(known or [0.0]), statistics.stdev(known) if len(known) > 1 else 0.0
    expected = slow(rows, lambda reward, everyone, others: reward - statistics.fmean(everyone)) / (deviation + 1e-6)
    # As above: float32 rewards.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(advantages("zscore_batch", *columns(rows)), expected, **close)
    whitened = slow(rows, lambda reward, everyone, others: (reward - mean) / (deviation + 1e-6))
    torch.testing.assert_close(advantages("whiten", *columns(rows)), whitened if deviation else 0 * whitened, **close)


@given(rows=graded(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_baseline_of_opo_weighs_rewards_by_length(rows, seed):
    lengths = torch.randint(1, 9, (len(rows),), generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(len(rows), dtype=torch.float64)
    for i, (reward, group, verified) in enumerate(rows):
        peers = [(r, n) for (r, g, v), n in zip(rows, lengths.tolist(), strict=True) if g == group and v]
        if verified:
            expected[i] = reward - sum(r * n for r, n in peers) / sum(n for _, n in peers)
    torch.testing.assert_close(advantages("opo", *columns(rows), lengths), expected, rtol=1e-6, atol=1e-6)


def test_gdpo_whitens_over_tokens_as_if_each_were_a_response():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 4.0], [1.0, 2.0]], dtype=torch.float64)
    groups, tokens = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1, 2, 5])
    z = 0.5**0.5 / (1 + 1e-6 * 2**0.5)  # the z-score of two different rewards, up to the 1e-6 in the deviation
    sums = torch.tensor([z, -z, 0.0, 0.0], dtype=torch.float64)
    of_tokens = torch.repeat_interleave(sums, tokens)
    expected = (sums - of_tokens.mean()) / of_tokens.std()
    expected[2:] = expected[2]
    # The 1e-6 in the deviations.
    torch.testing.assert_close(gdpo(rewards, groups, tokens_B=tokens), expected, rtol=0, atol=1e-5)


def test_known_advantages_of_arm():
    logprobs = torch.tensor([-1, -0.5, -2, -0.1, -0.7, -1.5, -0.3, -2.5, -0.9], dtype=torch.float64)
    responses = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    sure_B = confidence(logprobs, responses, 3)
    assert sure_B.tolist() == pytest.approx([0.135335283237, 0.223130160148, 0.082084998624], abs=5.1e-13)
    base_B, groups_B = torch.tensor([1, -1, 0.5], dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    alphas_B = arm_alphas(base_B, groups_B, torch.ones(3, dtype=torch.bool), 0.3)
    changed = arm(base_B, alphas_B, torch.full((3,), 0.2), sure_B).tolist()
    # The prompt's .2 went through float32.
    assert changed == pytest.approx([1.019399415029, -1.006939048045, 0.535374500413], abs=1e-9)


def test_arm_leaves_uniform_groups_and_unverified_responses():
    base_B, groups_B = torch.tensor([1.0, -1, 0, 0, 0, 0.5]), torch.tensor([4, 4, 4, 7, 7, 9])
    verified_B = torch.tensor([True, True, False, True, True, True])
    assert arm_alphas(base_B, groups_B, verified_B, 0.3).tolist() == [0.3, 0.3, 0, 0, 0, 0.3]


def test_known_weights_of_unbiased_pruning():
    probabilities = torch.tensor([0.5, 0, 0.25], dtype=torch.float64)
    kept = torch.ones(3, dtype=torch.bool)
    assert pruned_weights(probabilities, kept).tolist() == [1.5, 0.75, 1.0]
    assert pruned_weights(probabilities, ~kept).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        pruned_weights(torch.ones(1), kept[:1])


def test_the_expected_pruned_sum_is_a_fixed_share_of_the_sum():
    """Exactly: over all subsets, each with its probability."""
    probabilities, terms = torch.tensor([0.5, 0, 0.25], dtype=torch.float64), torch.tensor([1.0, 2, 4]).double()
    expected = 0.0
    for subset in itertools.product([False, True], repeat=3):
        kept = torch.tensor(subset)
        likelihood = torch.where(kept, 1 - probabilities, probabilities).prod().item()
        expected += likelihood * float((pruned_weights(probabilities, kept) * terms).sum())
    assert expected == pytest.approx(0.75 * 7, rel=1e-12)


def test_small_advantages_are_pruned_most():
    chances = drop_probabilities(torch.tensor([-2.0, 0, 1]), 0.8).tolist()
    assert chances == pytest.approx([0, 0.8, 0.4], abs=1e-15)
    assert drop_probabilities(torch.zeros(2), 0.8).tolist() == [0, 0]
