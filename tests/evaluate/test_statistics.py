"""Statistics against known values, brute force and simulation."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import DataError
from megatron_rl.evaluate.statistics import (
    MIN_P,
    Estimate,
    holm,
    interval,
    majority_at_k,
    paired_interval,
    pass_at_k,
    sign_flip_p,
    student_quantile,
)


def test_pass_at_k_has_the_known_answers():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6, abs=1e-15)
    assert pass_at_k(5, 1, 5) == 1.0
    assert pass_at_k(5, 0, 3) == 0.0


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_all_draws_with_a_correct_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def majority_by_hand(samples, k):
    won, draws = 0.0, list(combinations(samples, k))
    for draw in draws:
        votes = {answer: draw.count(answer) for answer in set(draw) - {""}}
        leaders = [answer for answer in votes if votes[answer] == max(votes.values())]
        won += ("right" in leaders) / max(len(leaders), 1)
    return won / len(draws)


@given(st.lists(st.sampled_from(["right", "a", "b", "c", ""]), min_size=1, max_size=8), st.data())
def test_majority_is_the_share_of_draws_won_by_the_right_answer(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    wrong = tuple(count for answer in "abc" if (count := samples.count(answer)))
    found = majority_at_k(samples.count("right"), wrong, samples.count(""), k)
    assert found == pytest.approx(majority_by_hand(samples, k), abs=1e-12)


def test_majority_of_one_is_pass_at_one():
    assert majority_at_k(3, (2, 1), 4, 1) == pytest.approx(pass_at_k(10, 3, 1), abs=1e-15)


def test_students_quantile_matches_tables():
    table = {3: 3.1824, 5: 2.5706, 10: 2.2281, 24: 2.0639, 60: 2.0003}
    assert [student_quantile(freedom) for freedom in table] == pytest.approx(list(table.values()), rel=0.01)
    assert student_quantile(24) == pytest.approx(2.0639, abs=1e-4)


def test_one_sample_per_prompt_gives_wilsons_interval():
    # 40 of 50: the textbook has 0.670 to 0.888 with the normal quantile, Student's with 49 and n - 1 are 3.5 % wider
    found = interval([1.0] * 40 + [0.0] * 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.670, 0.888), abs=7e-3)
    # all right: the lower end is n / (n + t^2)
    assert interval([1.0] * 20).high == 1.0
    assert interval([1.0] * 20).low == pytest.approx(20 / (20 + 2.093**2), abs=1e-4)
    assert interval([0.0] * 20).low == 0.0
    assert interval([1.0]) == Estimate(1.0, 0.0, 1.0)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30))
def test_an_interval_contains_its_mean_and_stays_between_0_and_1(values):
    found = interval(values)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.low < found.high


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("prompts", [10, 25, 100])
@pytest.mark.parametrize("difficulty", [(1.0, 1.0), (0.3, 0.1), (8.0, 8.0), (0.2, 4.0)])
def test_the_interval_covers_the_truth(samples, prompts, difficulty):
    """Prompts from beta distributions: uniform, U-shaped, all similar, mostly hard."""
    rng = np.random.default_rng(1)
    truth = difficulty[0] / sum(difficulty)
    rounds = 1000
    chances = rng.beta(*difficulty, size=(rounds, prompts))
    values = rng.binomial(samples, chances) / samples
    covered = sum(found.low <= truth <= found.high for found in (interval(row.tolist()) for row in values))
    # 0.95 is asked for; 1000 rounds have a standard error of 0.007, and answers are discrete
    assert covered / rounds >= 0.925


def test_an_interval_without_clustering_would_not_cover():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        chances = rng.beta(0.3, 0.3, size=50)
        values = rng.binomial(16, chances) / 16
        naive = interval(np.repeat(values, 16).tolist())
        hits += naive.low <= 0.5 <= naive.high
    assert hits / 400 < 0.7


def flips(differences):
    observed = abs(sum(differences))
    signs = list(product([1, -1], repeat=len(differences)))
    return sum(abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= observed for row in signs) / len(signs)


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=10))
def test_the_permutation_test_counts_every_flip(differences):
    assert sign_flip_p(differences) == pytest.approx(flips(differences), abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (3, 9), (12, 12), (40, 61), (2, 300)])
def test_with_one_sample_it_is_mcnemars_exact_test(wins, losses):
    discordant = wins + losses
    tail = sum(comb(discordant, i) for i in range(min(wins, losses) + 1)) / 2**discordant
    expected = min(1.0, max(MIN_P, 2 * tail))
    assert sign_flip_p([1] * wins + [-1] * losses + [0] * 50) == pytest.approx(expected, abs=1e-12)


def test_p_values_below_rounding_error_are_bounded():
    assert sign_flip_p([1] * 2000) == sign_flip_p([3] * 5000) == MIN_P


def test_no_difference_gives_p_value_one():
    assert sign_flip_p([0, 0, 0]) == 1.0
    assert sign_flip_p([2, -2]) == 1.0


def test_too_many_units_are_an_error():
    with pytest.raises(DataError, match="same evaluate"):
        sign_flip_p([1 << 22, 1])


def test_level_and_power_of_the_permutation_test():
    rng = np.random.default_rng(3)

    def alarms(shift):
        count = 0
        for _ in range(400):
            chances = rng.uniform(0.1, 0.7, size=100)
            first, second = rng.binomial(4, chances), rng.binomial(4, chances + shift)
            count += sign_flip_p((second - first).tolist()) < 0.05
        return count / 400

    assert alarms(0.0) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    assert alarms(0.15) > 0.8


def test_the_paired_interval_covers_the_truth_and_is_deterministic():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(300):
        chances = rng.beta(0.5, 0.5, size=60)
        first, second = rng.binomial(4, chances * 0.9), rng.binomial(4, chances)
        found = paired_interval(((second - first) / 4).tolist())
        covered += found.low <= 0.05 <= found.high  # 0.1 of a mean of 0.5
    assert covered / 300 > 0.90  # standard error 0.013; the bootstrap of 60 prompts is a little narrow
    assert paired_interval([0.0, 0.5, 1.0], 7) == paired_interval([0.0, 0.5, 1.0], 7)


def test_holm_matches_a_textbook_example():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
