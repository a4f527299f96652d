from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatron_rl.inference_server.requests import SamplingParams
from megatron_rl.inference_server.sampler import SamplingTensors, masked_probs, sample, truncate, uniforms

ROWS = 40_000
# 99.9 % quantile of chi-square with n degrees of freedom
QUANTILE = {4: 18.5, 15: 37.7, 19: 43.8}


def columns(sequences: int, **params: float) -> SamplingTensors:
    return SamplingTensors.of([SamplingParams.model_validate(params)] * sequences, range(sequences), vocabulary=20)


def chi_square(drawn_B: Tensor, probs_V: Tensor) -> float:
    expected_V = probs_V.double() * len(drawn_B)
    counts_V = torch.bincount(drawn_B, minlength=len(probs_V)).double()
    assert counts_V[expected_V == 0].sum() == 0
    kept = expected_V > 0
    return float((((counts_V - expected_V) ** 2)[kept] / expected_V[kept]).sum())


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    consecutive = torch.arange(ROWS)
    for seeds_B, positions_B in ((consecutive, torch.tensor(7)), (torch.tensor(123), consecutive)):
        bins_B = (uniforms(seeds_B, positions_B) * 16).long()
        assert chi_square(bins_B, torch.full((16,), 1 / 16)) < QUANTILE[15]


def test_neighbouring_uniforms_are_not_related() -> None:
    u_B = uniforms(torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    v_B = uniforms(torch.arange(ROWS), torch.ones(ROWS, dtype=torch.int64))
    for a_B, b_B in ((u_B[1:], u_B[:-1]), (u_B, v_B)):
        assert abs(float(torch.corrcoef(torch.stack([a_B, b_B]))[0, 1])) < 4 / ROWS**0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits_V = torch.linspace(-2, 2, 20)
    logits_BV = logits_V.expand(ROWS, -1)
    tokens_B, logprobs_B = sample(
        logits_BV, columns(ROWS, temperature=temperature), torch.zeros(ROWS, dtype=torch.int64)
    )
    expected_V = (logits_V / temperature).softmax(-1)
    assert chi_square(tokens_B, expected_V) < QUANTILE[19]
    torch.testing.assert_close(logprobs_B, expected_V.log()[tokens_B], atol=1e-6, rtol=0)


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.5, "temperature": 0.7}])
def test_kept_probs_are_those_that_tokens_are_drawn_with(params: Mapping[str, float]) -> None:
    logits_V = torch.linspace(-2, 2, 20)
    sampling = columns(ROWS, **params)
    tokens_B, _ = sample(logits_V.expand(ROWS, -1), sampling, torch.zeros(ROWS, dtype=torch.int64))
    [probs_V] = masked_probs(logits_V[None], columns(1, **params))
    assert float(probs_V.sum()) == pytest.approx(1, abs=1e-12)
    assert set(tokens_B.unique().tolist()) == set(probs_V.nonzero()[:, 0].tolist())


def test_only_one_id_is_kept_for_a_greedy_sequence() -> None:
    [probs_V] = masked_probs(torch.linspace(-2, 2, 20)[None], columns(1, temperature=0, top_k=5))
    assert probs_V.tolist() == [0.0] * 19 + [1.0]


def test_truncated_draws_follow_the_rest_and_report_the_whole() -> None:
    logits_V = torch.linspace(-2, 2, 20)
    tokens_B, logprobs_B = sample(
        logits_V.expand(ROWS, -1), columns(ROWS, top_k=5), torch.zeros(ROWS, dtype=torch.int64)
    )
    probs_V = logits_V.softmax(-1)
    rest_V = torch.where(probs_V >= probs_V.sort().values[-5], probs_V, 0)
    assert chi_square(tokens_B, rest_V / rest_V.sum()) < QUANTILE[4]
    torch.testing.assert_close(logprobs_B, probs_V.log()[tokens_B], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}]
)
def test_truncation_equals_a_loop_over_sorted_tokens(params: Mapping[str, float]) -> None:
    probs_BV = (torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 2).double().softmax(-1)
    rest_BV = truncate(probs_BV, columns(50, **params))
    for probs_V, kept_V in zip(probs_BV, rest_BV, strict=True):
        expected, before = set[int](), 0.0
        for rank, token in enumerate(sorted(range(20), key=lambda i: -float(probs_V[i]))):
            p = float(probs_V[token])
            within_k = params.get("top_k", 20) > rank
            if within_k and before <= params.get("top_p", 1) and p >= params.get("min_p", 0) * float(probs_V.max()):
                expected.add(token)
            before += p
        assert set(kept_V.nonzero()[:, 0].tolist()) == expected


def test_greedy_rows_take_the_largest_logit_among_sampled_rows() -> None:
    logits_BV = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.0) for i in range(64)]
    tokens_B, _ = sample(logits_BV, SamplingTensors.of(params, range(64), 20), torch.zeros(64, dtype=torch.int64))
    torch.testing.assert_close(tokens_B[1::2], logits_BV.argmax(-1)[1::2])
    assert not torch.equal(tokens_B[::2], logits_BV.argmax(-1)[::2])


def test_a_row_draws_the_same_whatever_rows_are_beside_it() -> None:
    logits_BV = torch.randn(64, 20, generator=torch.Generator().manual_seed(2))
    positions_B = torch.arange(64)
    whole_B, _ = sample(logits_BV, columns(64), positions_B)
    alone_B, _ = sample(logits_BV[:5], columns(5), positions_B[:5])
    assert torch.equal(whole_B[:5], alone_B)
