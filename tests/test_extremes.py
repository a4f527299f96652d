"""No objective, correction, gate or KL term gives a value that is not finite, at any probabilities, 0 included."""

import math
from collections.abc import Mapping
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megatron_rl
from megatron_rl.algorithms.finite import SMALLEST_LOGPROB, finite_logprobs
from megatron_rl.algorithms.kl import binary_kl
from megatron_rl.api import Option
from tests.oracle.objectives import CASES, VOCABULARY_SIZE

EXTREMES = (-math.inf, -1e30, -2000.0, -200.0, -89.0, -1.0, -1e-7, 0.0)
"""Log-probs: probability 0, ratios beyond float32 and float64, certainty."""
WEIGHTS: dict[str, Mapping[str, Option]] = {
    "none": {},
    "tis": {"kind": "tis"},
    "tis by response": {"kind": "tis", "level": "sequence"},
    "mis by segment": {"kind": "mis", "level": "segment", "reduction": "geometric"},
    "icepop": {"kind": "icepop"},
    "binary by response": {"kind": "binary", "level": "sequence", "reduction": "geometric"},
    "bypass": {"kind": "bypass"},
    "opsm": {"opsm_delta": 0.1},
    "opsm of the engine": {"kind": "tis", "opsm_delta": 0.1, "opsm_anchor": "rollout"},
}
GATES = {
    f"{measure} {reduction} {level} {policy}": {
        "gates": {
            "it": {
                "measure": measure,
                "reduction": reduction,
                "level": level,
                "policy": policy,
                "low": 0.1,
                "high": 1e3,
            }
        }
    }
    for measure, reductions in {
        "ratio": ("product", "geometric", "max"),
        "kl": ("mean", "max"),
        "k3": ("mean",),
    }.items()
    for reduction in reductions
    for level, policy in (("token", "old"), ("segment", "current"), ("sequence", "current"))
} | {"tv": {"gates": {"it": {"measure": "tv", "high": 0.5}}}}
CORRECTIONS: dict[str, Mapping[str, Option]] = {**WEIGHTS, **GATES}
TERMS: dict[str, Mapping[str, Option]] = {
    "k1": {"coefficient": 0.1, "estimator": "k1"},
    "k2": {"coefficient": 0.1, "estimator": "k2"},
    "k3": {"coefficient": 0.1, "estimator": "k3"},
    "abs": {"coefficient": 0.1, "estimator": "abs"},
    "unbiased": {"coefficient": 0.1, "unbiased": True},
}


def run(options: Mapping[str, Option], columns: Mapping[str, Tensor], advantages_B: Tensor, *, segments: bool):
    """Return (loss, gradient [B, S], metrics) with every token trained."""
    logprobs = columns["logprobs"].clone().requires_grad_()
    shape = logprobs.shape
    ids = torch.arange(shape[1]).div(3, rounding_mode="floor").expand(shape) if segments else None
    result = megatron_rl.policy_loss(
        options,
        logprobs=logprobs,
        old_logprobs=columns["old"],
        rollout_logprobs=columns["rollout"],
        ref_logprobs=columns["ref"],
        advantages=advantages_B,
        loss_mask=torch.ones(shape),
        entropies=torch.linspace(0, 2, shape.numel()).view(shape).to(logprobs.dtype),
        segment_ids=ids,
        vocab_size=VOCABULARY_SIZE,
    )
    result.loss.backward()
    assert logprobs.grad is not None
    return result.loss.detach(), logprobs.grad, result.metrics


def assert_finite(options: Mapping[str, Option], columns: Mapping[str, Tensor], advantages_B: Tensor, segments: bool):
    loss, gradient, metrics = run(options, columns, advantages_B, segments=segments)
    infinite = {name for name, value in metrics.items() if not math.isfinite(value)}
    assert math.isfinite(loss), f"loss {loss} with {options}"
    assert gradient.isfinite().all(), f"gradient of {options}"
    assert not gradient[columns["logprobs"] == -math.inf].any(), f"probability 0 has a gradient with {options}"
    assert not infinite, f"metrics {infinite} of {options}"


def grid(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Return every combination of extremes for new, old and rollout log-probs, per sign of the advantage."""
    values = torch.tensor(list(product(EXTREMES, repeat=3)), dtype=dtype).T
    # Responses of one token, of a few, and of many.
    tokens = values.shape[1]
    new, old, rollout = (value.view(tokens // 8, 8).repeat(3, 1) for value in values)
    ref = old.roll(1, 0)
    advantages_B = torch.tensor([1.5, -1.5, 0.0], dtype=dtype).repeat_interleave(tokens // 8)
    return {"logprobs": new, "old": old, "rollout": rollout, "ref": ref}, advantages_B


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_finite_at_extremes_under_every_weight_and_gate(case, dtype):
    columns, advantages_B = grid(dtype)
    for correction in CORRECTIONS.values():
        if CASES[case].options["name"] != "dppo" or correction.get("kind") != "bypass":
            options: dict[str, Option] = {**CASES[case].options, "correction": correction}
            assert_finite(options, columns, advantages_B, CASES[case].takes_segments)


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_random_responses_of_extremes_are_finite(case, data):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    value = st.one_of(st.sampled_from(EXTREMES), st.floats(-1e4, 0))
    lists = st.lists(value, min_size=rows * width, max_size=rows * width)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    names = ("logprobs", "old", "rollout", "ref")
    columns = {name: torch.tensor(data.draw(lists), dtype=dtype).view(rows, width) for name in names}
    advantages = data.draw(st.lists(st.sampled_from([-30.0, -1.0, 0.0, 1e-3, 30.0]), min_size=rows, max_size=rows))
    correction = CORRECTIONS[data.draw(st.sampled_from(sorted(CORRECTIONS)))]
    kl = data.draw(st.sampled_from([{}, *TERMS.values()]))
    options: dict[str, Option] = {**CASES[case].options, "correction": correction, "kl": kl}
    assert_finite(options, columns, torch.tensor(advantages, dtype=dtype), CASES[case].takes_segments)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_kl_term_is_finite_at_extremes(term, dtype):
    columns, advantages_B = grid(dtype)
    assert_finite({"name": "grpo", "kl": TERMS[term]}, columns, advantages_B, segments=False)


NO_LOSS = {"grpo", "gspo", "sspo", "espo", "gmpo", "cispo", "dppo", "bapo"}
"""Objectives whose cost is proportional to a ratio, which becomes 0 with the probability."""
NO_GRADIENT = NO_LOSS | {"sapo", "dis", "r2vpo"}
"""Objectives whose gradient is. At ratio 0 the gate of sapo, the clip of dis and the penalty of r2vpo are constants."""


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].options["name"] in NO_GRADIENT])
@pytest.mark.parametrize("gone", [-math.inf, -1e30, -2000.0])
def test_a_positive_response_of_probability_zero_has_no_gradient(case, gone):
    """Ratio 0: -r A is 0, and so is its gradient."""
    ones = {name: torch.full((1, 3), -1.0, dtype=torch.float64) for name in ("old", "rollout", "ref")}
    columns = ones | {"logprobs": torch.full((1, 3), gone, dtype=torch.float64)}
    segments = CASES[case].takes_segments
    loss, gradient, _ = run(CASES[case].options, columns, torch.ones(1), segments=segments)
    if case == "kimi k2.5":  # its squared log ratio acts on every token
        assert bool(gradient.any()) == (gone == -2000)
    elif CASES[case].options["name"] in NO_LOSS and "top entropy" not in case and case != "clip-cov":
        assert loss == 0
        assert not gradient.any()
    else:
        assert not gradient.any()


def test_one_token_of_probability_zero_makes_the_geometric_mean_of_a_long_response_zero():
    columns = {name: torch.full((1, 5000), -1.0) for name in ("logprobs", "old", "rollout", "ref")}
    columns["logprobs"][0, 7] = -math.inf
    loss, gradient, _ = run({"name": "gspo"}, columns, torch.ones(1), segments=False)
    assert loss == 0
    assert not gradient.any()


def test_a_ratio_beyond_the_largest_one_counts_as_the_largest_one():
    columns = {name: torch.full((1, 1), -1.0, dtype=torch.float64) for name in ("logprobs", "rollout", "ref")}
    columns["old"] = torch.full((1, 1), -100.0, dtype=torch.float64)
    loss, gradient, metrics = run({"name": "grpo"}, columns, -torch.ones(1, dtype=torch.float64), segments=False)
    assert loss == pytest.approx(math.exp(20))
    assert gradient.item() == pytest.approx(math.exp(20))
    assert metrics["ratio_max"] == pytest.approx(math.exp(20))


def test_only_values_below_the_smallest_log_prob_are_raised():
    values = torch.tensor([-math.inf, -1e30, SMALLEST_LOGPROB, -5.0, 0.0, math.inf, math.nan])
    expected = torch.tensor([SMALLEST_LOGPROB, SMALLEST_LOGPROB, SMALLEST_LOGPROB, -5.0, 0.0, math.inf, math.nan])
    torch.testing.assert_close(finite_logprobs(values), expected, equal_nan=True, rtol=0, atol=0)


def test_nan_is_not_hidden():
    columns = {name: torch.full((1, 2), -1.0) for name in ("logprobs", "old", "rollout", "ref")}
    columns["logprobs"][0, 0] = math.nan
    assert run({"name": "reinforce"}, columns, torch.ones(1), segments=False)[0].isnan()


def test_the_binary_kl_is_finite_where_rounding_lifts_a_log_prob_above_zero():
    lifted = torch.tensor([1e-7, -1.0, 1e-7])
    assert binary_kl(lifted, torch.tensor([-1.0, 1e-7, 1e-7])).isfinite().all()


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, math.nan])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(value):
    tensor = torch.full((1, 2), -1.0)
    common = {"logprobs": tensor, "old_logprobs": tensor, "advantages": torch.ones(1)}
    with pytest.raises(ValueError, match="loss_mask has the value"):
        megatron_rl.policy_loss("grpo", **common, loss_mask=torch.tensor([[1.0, value]]), state=None)
    megatron_rl.policy_loss("grpo", **common, loss_mask=torch.tensor([[1, 0]]), state=None)
