"""The public function, which runs the trainer's code, against the slow transcription and the known answers."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import megatron_rl
from megatron_rl.algorithms.objectives import OBJECTIVES
from megatron_rl.api import Option
from megatron_rl.errors import ConfigError
from tests.oracle import objectives as oracle
from tests.oracle.objectives import CASES, VOCABULARY_SIZE, Row

EXACT = (1e-12, 1e-13)
"""Relative and absolute: float64, a few dozen operations: some hundred roundings of 1e-16."""
GARBAGE = (math.nan, math.inf, -math.inf, 800.0, 0.0)


def run(
    rows: list[Row],
    options: str | Mapping[str, Option],
    *,
    padding: int = 0,
    garbage: float = math.nan,
    gaps: bool = False,
    segments=None,
):
    """Return (loss, gradient per row, metrics) of the public function on rows laid out with padding."""
    width = (2 if gaps else 1) * max([len(row.new) for row in rows], default=0) + padding
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    places = [[(2 * t + 1 if gaps else t) for t in range(len(row.new))] for row in rows]
    for i, where in enumerate(places):
        mask[i, where] = True

    def column(values_of) -> Tensor:
        filled = torch.full((len(rows), width), garbage, dtype=torch.float64)
        for i, (row, where) in enumerate(zip(rows, places, strict=True)):
            filled[i, where] = torch.tensor(list(values_of(row)), dtype=torch.float64)
        return filled

    logprobs = column(lambda row: row.new).requires_grad_()
    ids = None
    if segments:
        ids = torch.full((len(rows), width), -1)
        for i, (row, where) in enumerate(zip(rows, places, strict=True)):
            ids[i, where] = torch.tensor(list(row.segments), dtype=torch.int64)
    result = megatron_rl.policy_loss(
        options,
        logprobs=logprobs,
        old_logprobs=column(lambda row: row.old),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float64),
        loss_mask=mask,
        entropies=column(lambda row: row.entropies),
        segment_ids=ids,
        rollout_logprobs=column(lambda row: row.rollout or row.old),
        vocab_size=VOCABULARY_SIZE,
    )
    assert result.loss.dtype == torch.float64
    result.loss.backward()
    assert logprobs.grad is not None
    assert not logprobs.grad[~mask].any(), "a masked slot has a gradient"
    return result.loss.item(), [logprobs.grad[i, where].tolist() for i, where in enumerate(places)], result.metrics


def agree(actual, expected, tolerance=EXACT) -> None:
    rtol, atol = tolerance
    pairs = [([actual[0]], [expected[0]]), *zip(actual[1], expected[1], strict=True)]
    for found, wanted in pairs:
        found_R, wanted_R = (torch.tensor(values, dtype=torch.float64) for values in (found, wanted))
        torch.testing.assert_close(found_R, wanted_R, rtol=rtol, atol=atol)


@st.composite
def batches(draw, shortest: int = 0, step: float | None = None) -> list[Row]:
    """Mini-batches with rows of every length, from on-policy to far off, with equal and zero advantages."""
    lengths = draw(st.lists(st.integers(shortest, 9), min_size=1, max_size=5))
    step = draw(st.sampled_from([0.0, 1e-3, 0.1, 2.0])) if step is None else step
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    same = draw(st.booleans())
    rows = []
    for length in lengths:
        old = (-3 * torch.rand(length, generator=generator, dtype=torch.float64) - 1e-3).tolist()
        noise = (step * torch.randn(length, generator=generator, dtype=torch.float64)).tolist()
        rollout = (0.1 * torch.randn(length, generator=generator, dtype=torch.float64)).tolist()
        rows.append(
            Row(
                new=[min(a + b, -1e-4) for a, b in zip(old, noise, strict=True)],
                old=old,
                entropies=torch.randint(0, 5, (length,), generator=generator).div(2.5).tolist(),
                advantage=1.0 if same else draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, -2.0])),
                segments=torch.randint(0, 3, (length,), generator=generator).tolist(),
                rollout=[min(a + b, -1e-3) for a, b in zip(old, rollout, strict=True)],
            )
        )
    return rows


def test_every_registered_objective_has_a_case():
    assert {case.options["name"] for case in CASES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("case", CASES)
@given(rows=batches(), padding=st.integers(0, 3), garbage=st.sampled_from(GARBAGE), gaps=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_loss_and_gradient_equal_the_transcription(case, rows, padding, garbage, gaps):
    test = CASES[case]
    actual = run(rows, test.options, padding=padding, garbage=garbage, gaps=gaps, segments=test.takes_segments)
    agree(actual, test.formula(rows))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.is_slope])
@given(rows=batches(shortest=1, step=0.07), i=st.integers(0, 4), t=st.integers(0, 8))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_gradient_is_the_slope_of_the_transcribed_loss(case, rows, i, t):
    test = CASES[case]
    i, t = i % len(rows), t % len(rows[i % len(rows)].new)

    def at(shift: float) -> float:
        new = [value + shift * (k == t) for k, value in enumerate(rows[i].new)]
        return test.formula([*rows[:i], replace(rows[i], new=new), *rows[i + 1 :]])[0]

    left, middle, right = at(-1e-6), at(0.0), at(1e-6)
    kink = abs((right - middle) - (middle - left)) > 1e-9
    gradient = run(rows, test.options, segments=test.takes_segments)[1][i][t]
    # Central differences at 1e-6: truncation 1e-12, cancellation 1e-10.
    assert kink or gradient == pytest.approx((right - left) / 2e-6, abs=1e-8)


KNOWN_ROWS = [
    Row([-0.7, -0.55, -1.9, -0.5], [-1, -0.5, -2, -0.1], [1.2, 0.2, 2.4, 0.05], 1.0, [0, 0, 1, 1]),
    Row([-0.68, -1.8], [-0.7, -1.5], [0.6, 1.8], -1.0, [0, 0]),
    Row([-0.55, -2.0, -0.89], [-0.3, -2.5, -0.9], [0.1, 2.0, 0.3], 0.5, [0, 1, 1]),
]
KNOWN = {
    "grpo": (
        {"name": "grpo"},
        -0.189907084055,
        [[0, -0.079269119, -0.092097577, -0.055860004], [0.170033557, 0], [-0.043266710, 0, -0.056113898]],
    ),
    "gspo": (
        {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05},
        -0.187525933498,
        [[-0.082298150] * 4, [0, 0], [0, 0, 0]],
    ),
    "sapo": (
        {"name": "sapo"},
        -0.434118156061,
        [
            [-0.109115083, -0.079222001, -0.091843374, -0.054369242],
            [0.170014433, 0.121211566],
            [-0.042741746, -0.082596589, -0.056112481],
        ],
    ),
    "espo": (
        {"name": "espo", "alpha": 0.5},
        -0.197054996522,
        [
            [-0.052846079, -0.052846079, -0.184195153, -0.052846079],
            [0.170033557, 0],
            [-0.036955018, 0, -0.036955018],
        ],
    ),
    "lpo": (
        {"name": "sspo", "entropy_scale": "none", "aggregation": "token"},
        -0.362312927154,
        [[0, 0, -0.095634220, -0.095634220], [0, 0], [-0.043266710, 0, 0]],
    ),
    "minpro": (
        {"name": "minpro"},
        0.413297574655,
        [
            [-0.142222222222, -0.142222222222, -0.116807899597, -0.088888888889],
            [0.113355704447, 0.088888888889],
            [-0.044444444444, -0.071111111111, -0.044444444444],
        ],
    ),
    "vespo": (
        {"name": "vespo"},
        0.362805383990,
        [[-0.116377873631] * 4, [0.078176040938] * 2, [-0.038343815920] * 3],
    ),
    "luspo": (
        {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sum"},
        -1.282464797771,
        [[-0.329192600165] * 4, [0.289786078466] * 2, [-0.181755518015] * 3],
    ),
    "dis": (
        {"name": "dis"},
        -0.429024898455,
        [[0, -0.105692158278, -0.122796768675, 0], [0.113355704447, 0], [0, 0, -0.056113898171]],
    ),
    "kimi k2.5": (
        {"name": "dis", "tau": 0.1},
        -0.421630454010,
        [
            [0.006666666667, -0.106803269389, -0.120574546453, -0.008888888889],
            [0.113800148892, -0.006666666667],
            [-0.005555555556, 0.011111111111, -0.055891675949],
        ],
    ),
    "cispo against the engine": (
        {"name": "cispo", "anchor": "rollout"},
        0.465357357566,
        [
            [-0.149984311953, -0.105692158278, -0.122796768675, -0.074480005115],
            [0.113355704447, 0.082313135631],
            [-0.043266710171, -0.091595626150, -0.056113898171],
        ],
    ),
    "r2vpo": (
        {"name": "r2vpo"},
        -0.444785161884,
        [
            [-0.145786445350, -0.106104531669, -0.121763596763, -0.076444370288],
            [0.113538899418, 0.080606410435],
            [-0.044798000156, -0.082088421192, -0.056023665523],
        ],
    ),
    "dro": (
        {"name": "dro"},
        0.324808333333,
        [
            [-0.107777777778, -0.111666666667, -0.11, -0.115555555556],
            [0.111333333333, 0.107777777778],
            [-0.058333333333, -0.05, -0.055444444444],
        ],
    ),
    "soft sequence": (
        {"name": "soft_sequence"},
        -0.218912113379,
        [
            [-0.075704386264, -0.082312001025, -0.081700773295, -0.071136018127],
            [0.145454912590, 0.133498251885],
            [-0.056428918707, -0.047964580901, -0.059949731153],
        ],
    ),
    "aspo": (
        {"name": "aspo"},
        None,  # the paper's code defines the gradient only
        [
            [0, -0.116807899597, -0.100537490893, -0.165758299738],
            [0.113355704447, 0.082313135631],
            [-0.071334745372, 0, -0.055002768542],
        ],
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_answers(case):
    options, loss, gradient = KNOWN[case]
    actual = run(KNOWN_ROWS, options, segments=case == "lpo")
    # As many digits as were written down.
    assert loss is None or actual[0] == pytest.approx(loss, abs=5.1e-13)
    digits = 5.1e-10 if case in ("grpo", "gspo", "sapo", "espo", "lpo") else 5.1e-13
    for row, wanted in zip(actual[1], gradient, strict=True):
        assert row == pytest.approx(wanted, abs=digits)


def test_the_multiplier_of_r2vpo_takes_one_step_of_dual_ascent():
    columns = {
        "logprobs": torch.tensor([[math.log(1.5), math.log(0.5), 0.0]], dtype=torch.float64) - 2,
        "old_logprobs": torch.full((1, 3), -2.0, dtype=torch.float64),
        "advantages": torch.ones(1),
        "loss_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    assert run(KNOWN_ROWS, "r2vpo")[2]["objective/ratio_variance"] == pytest.approx(0.086886913743, abs=5.1e-13)
    result = megatron_rl.policy_loss("r2vpo", **columns, state=None)
    assert result.metrics["objective/multiplier"] == pytest.approx(0.04, abs=1e-15)
    assert result.state["multiplier"] == pytest.approx(0.04 + 0.1 * (0.5 / 3 - 0.05), abs=1e-15)
    following = megatron_rl.policy_loss("r2vpo", **columns, state=result.state)
    assert following.metrics["objective/multiplier"] == pytest.approx(result.state["multiplier"], abs=1e-15)
    assert following.loss.item() - result.loss.item() == pytest.approx(
        (result.state["multiplier"] - 0.04) * 0.5 / 3, abs=1e-15
    )
    at_zero = megatron_rl.policy_loss({"name": "r2vpo", "delta": 100.0}, **columns, state=None)
    assert at_zero.state["multiplier"] == 0.0


def test_known_bounds_of_bapo():
    ratios = [2.4, 1.6, 0.9, 0.7, 1.1, 0.5, 0.8, 1.3]
    rows = [
        Row([math.log(r) - 2], [-2.0], [1.0], a) for r, a in zip(ratios, [1, 0.5, 0.5, 1, -1, -1, -1, -1], strict=True)
    ]
    metrics = run(rows, "bapo")[2]
    assert metrics["objective/low"] == pytest.approx(0.6, abs=1e-12)
    assert metrics["objective/high"] == pytest.approx(2.4, abs=1e-12)
    assert metrics["objective/positive_share"] == pytest.approx(0.576158940, abs=5.1e-10)


@pytest.mark.parametrize(("sign", "bounds"), [(1.0, (0.6, 1.2)), (-1.0, (0.9, 3.0))])
def test_bapo_stops_at_its_bounds_where_the_share_cannot_be_reached(sign, bounds):
    metrics = run([Row([-2.1, -2.0, -1.0], [-2.0] * 3, [1.0] * 3, sign)], "bapo")[2]
    assert (metrics["objective/low"], metrics["objective/high"]) == pytest.approx(bounds, abs=1e-12)


def test_kl_cov_replaces_the_clip_of_the_tokens_of_highest_covariance():
    """A = 1, 1, -1, -1 and old log-probs whose covariance is highest for the first token, then the third."""
    old, ratios, a = [-0.5, -2.0, -3.0, -1.0], [3.0, 3.0, 0.2, 0.2], [1.0, 1.0, -1.0, -1.0]
    rows = [Row([o + math.log(r)], [o], [1.0], x) for o, r, x in zip(old, ratios, a, strict=True)]
    options = {"name": "grpo", "covariance": {"kind": "kl", "fraction": 0.5, "coefficient": 0.3}}
    loss, gradient, metrics = run(rows, options)
    clip = [1.2, 1.2, -0.8, -0.8]
    penalized = {t: ratios[t] * a[t] - 0.3 * abs(math.log(ratios[t])) for t in (0, 2)}
    assert loss == pytest.approx(-sum(penalized.get(t, clip[t]) for t in range(4)) / 4, abs=1e-14)
    slopes = [-(3.0 - 0.3) / 4, 0.0, -(-0.2 + 0.3) / 4, 0.0]
    assert [slope for (slope,) in gradient] == pytest.approx(slopes, abs=1e-14)
    assert metrics["clipped_fraction"] == 0.5


def test_clip_cov_drops_a_seeded_fraction_of_the_candidates():
    generator = torch.Generator().manual_seed(0)
    old = (-3 * torch.rand(400, generator=generator, dtype=torch.float64) - 0.01).tolist()
    rows = [Row(old[i : i + 10], old[i : i + 10], [1.0] * 10, (-1.0) ** (i // 10)) for i in range(0, 400, 10)]

    def dropped(seed: int) -> list[bool]:
        covariance = {"kind": "clip", "fraction": 0.05, "low": 0.1, "high": 1.0, "seed": seed}
        gradient = run(rows, {"name": "grpo", "covariance": covariance})[1]
        return [slope == 0 for row in gradient for slope in row]

    mean_old = sum(old) / len(old)
    first = dropped(0)
    assert sum(first) == 20
    assert all(0.1 <= (-1.0) ** (t // 10) * (old[t] - mean_old) <= 1.0 for t in range(400) if first[t])
    assert first == dropped(0)
    assert first != dropped(1)


def test_top_entropy_of_the_batch_compares_all_responses():
    rows = [Row([-1.0] * 2, [-1.0] * 2, entropies, 1.0) for entropies in ([3.0, 2.0], [1.0, 4.0], [0.5, 0.4])]
    options = {"name": "grpo", "top_entropy_fraction": 0.5, "top_entropy_scope": "batch"}
    gradient = run(rows, options)[1]
    assert [[slope != 0 for slope in row] for row in gradient] == [[True, True], [False, True], [False, False]]
    assert gradient[0][0] == pytest.approx(-1 / 6, abs=1e-15)


def test_known_gradient_of_lco_by_the_logits():
    logits = torch.arange(4, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, dim=0)[2].reshape(1, 1)
    loss = megatron_rl.policy_loss(
        "lco",
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.ones(1),
        loss_mask=torch.ones(1, 1, dtype=torch.bool),
    ).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    known = [0.009274035482, 0.025209442126, -0.220757459703, 0.186273982095]
    assert gradient.tolist() == pytest.approx(known, abs=5.1e-13)
    # The definition: the KL divergence from the policy to the one with A / beta added to the sampled token's logit.
    target = torch.log_softmax(logits.detach() + torch.tensor([0, 0, 1.0, 0]).double(), dim=0)
    (slope,) = torch.autograd.grad(-(target.exp() * torch.log_softmax(logits, dim=0)).sum(), logits)
    assert gradient.tolist() == pytest.approx(slope.tolist(), abs=1e-14)


@pytest.mark.parametrize(
    ("tau", "gates"),
    [
        (1.00, [0.940014849, 0.990066291, 1, 0.940014849, 0.786447733, 0.419974342, 0.070650825]),
        (1.05, [0.934139823, 0.989055530, 1, 0.934139823, 0.768109792, 0.388778819, 0.058223039]),
    ],
)
def test_known_gates_of_sapo(tau, gates):
    for ratio, gate in zip([0.5, 0.8, 1, 1.5, 2, 3, 5], gates, strict=True):
        row = Row([math.log(ratio) - 2], [-2.0], [1.0], 1.0)
        slope = run([row], {"name": "sapo", "tau_positive": tau})[1][0][0]
        assert -slope / ratio == pytest.approx(gate, abs=5.1e-10)


def test_the_token_mean_is_global():
    rows = [Row([-1.0], [-1.0], [1.0], 1.0), Row([-1.0] * 3, [-1.0] * 3, [1.0] * 3, -1.0)]
    assert run(rows, {"name": "grpo", "aggregation": "token"})[0] == pytest.approx(0.5, abs=1e-15)


RATIO_AT = {"inside": 0.0, "above": 0.3, "below": -0.4}
KEEPS = {("inside", 1): 1, ("above", 1): 0, ("below", 1): 1, ("inside", -1): 1, ("above", -1): 1, ("below", -1): 0}


@pytest.mark.parametrize(("place", "sign"), KEEPS)
@pytest.mark.parametrize("name", ["grpo", "gspo", "sspo", "espo"])
def test_direction_of_the_clip(name, place, sign):
    options = {"name": name} | ({"alpha": 1.4} if name == "espo" else {"clip_low": 0.2, "clip_high": 0.2})
    options |= {"entropy_scale": "none"} if name == "sspo" else {}
    row = Row([-1 + RATIO_AT[place]] * 2, [-1.0] * 2, [1.0] * 2, float(sign), [0, 0])
    _, gradient, metrics = run([row], options, segments=name == "sspo")
    assert [slope != 0 for slope in gradient[0]] == [bool(KEEPS[place, sign])] * 2
    assert metrics["clipped_fraction"] == 1 - KEEPS[place, sign]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bounds_are_inclusive(sign):
    on_policy = Row([-1.0], [-1.0], [1.0], sign)
    assert run([on_policy], {"name": "grpo", "clip_low": 0, "clip_high": 0})[1][0][0] == -sign
    bound = math.log(1.25) if sign > 0 else math.log(0.75)
    ratio = math.exp((-1.0 + bound) + 1.0)
    window = {"clip_high": ratio - 1, "clip_low": 1 - ratio} if sign > 0 else {"clip_low": 1 - ratio}
    window = {name: max(value, 0.0) for name, value in window.items()}
    if (1 + window["clip_high"] if sign > 0 else 1 - window["clip_low"]) == ratio:
        assert run([Row([-1.0 + bound], [-1.0], [1.0], sign)], {"name": "grpo", **window})[1][0][0] != 0


@pytest.mark.parametrize("name", ["grpo", "gspo", "sspo", "espo", "gmpo", "sapo"])
@pytest.mark.parametrize("step", [300.0, -300.0])
def test_extreme_log_ratios_leave_gradients_finite_where_the_loss_is(name, step):
    rows = [Row([-1.0 + step, -1.0], [-1.0, -1.0], [1.0, 2.0], a, [0, 1]) for a in (1.0, 0.0)]
    loss, gradient, _ = run(rows, name, segments=name == "sspo")
    assert math.isfinite(loss)
    assert all(math.isfinite(slope) for row in gradient for slope in row)


def fixed(name: str, width: float) -> dict[str, Option]:
    return {"name": name, "clip_low": width, "clip_high": width}


@given(rows=batches())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_espo_with_one_group_and_the_window_of_gspo_is_gspo(rows):
    flat = [Row(r.new, r.old, [1.0] * len(r.new), r.advantage) for r in rows]
    espo = {"name": "espo", "alpha": 0.05 * math.log(VOCABULARY_SIZE), "top_fraction": 1.0}
    agree(run(flat, espo), run(flat, fixed("gspo", 0.05)))


@given(rows=batches())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_token_segments_with_a_fixed_window_are_grpo(rows):
    single = [Row(r.new, r.old, [1.0] * len(r.new), r.advantage, range(len(r.new))) for r in rows]
    grpo = run(single, "grpo")
    agree(run(single, {"name": "espo", "alpha": 0.2 * math.log(VOCABULARY_SIZE)}, segments=True), grpo)
    agree(run(single, {**fixed("sspo", 0.2), "entropy_scale": "none"}, segments=True), grpo)
    agree(run(single, fixed("gspo", 0.2), segments=True), grpo)


@given(rows=batches())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_segment_makes_sspo_gspo(rows):
    whole = [Row(r.new, r.old, r.entropies, r.advantage, [0] * len(r.new)) for r in rows]
    sspo = run(whole, {**fixed("sspo", 0.05), "entropy_scale": "none"}, segments=True)
    agree(sspo, run(whole, fixed("gspo", 0.05)))
    agree(run(whole, fixed("grpo", 0.05), segments=True), sspo)


@given(rows=batches(step=0.0))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_on_policy_all_have_the_plain_policy_gradient_and_espo_its_weighted_one(rows):
    plain = [[-oracle.weight(rows, row) * row.advantage for _ in row.new] for row in rows]
    for name in ("grpo", "gspo", "sspo", "sapo", "gmpo"):
        _, gradient, metrics = run(rows, name, segments=name == "sspo")
        assert gradient == [pytest.approx(row, rel=1e-14) for row in plain]
        assert metrics["clipped_fraction"] == 0
        assert metrics["ratio_mean"] == pytest.approx(1.0 if any(row.new for row in rows) else 0.0, abs=0)
    filled = sum(1 for row in rows if row.new)
    gradient = run(rows, "espo")[1]
    for row, slopes in zip(rows, gradient, strict=True):
        groups = oracle.entropy_split(row)
        for group in groups:
            for t in group:
                assert slopes[t] == pytest.approx(-row.advantage / (filled * len(groups) * len(group)), rel=1e-14)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.scales])
@given(rows=batches(), factor=st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_scaling_the_advantage_scales_loss_and_gradient(case, rows, factor):
    options, segments = CASES[case].options, CASES[case].takes_segments
    scaled = [replace(row, advantage=factor * row.advantage) for row in rows]
    loss, gradient, _ = run(rows, options, segments=segments)
    expected = factor * loss, [[factor * slope for slope in row] for row in gradient]
    agree(run(scaled, options, segments=segments), expected)


@given(rows=batches())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_sapo_with_a_vanishing_tau_is_the_unclipped_ratio(rows):
    tau = 1e-7
    _, gradient, _ = run(rows, {"name": "sapo", "tau_positive": tau, "tau_negative": tau})
    for row, slopes in zip(rows, gradient, strict=True):
        for t, slope in enumerate(slopes):
            ratio = math.exp(row.new[t] - row.old[t])
            # sech^2(x) = 1 - x^2 + ...: with a ratio below 1e4 the gate is off by less than 1e-6.
            assert slope == pytest.approx(-oracle.weight(rows, row) * row.advantage * ratio, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@given(rows=batches(), order=st.randoms())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_order_of_the_responses_does_not_matter(case, rows, order):
    options, segments = CASES[case].options, CASES[case].takes_segments
    permutation = list(range(len(rows)))
    order.shuffle(permutation)
    loss, gradient, _ = run(rows, options, segments=segments)
    agree(run([rows[i] for i in permutation], options, segments=segments), (loss, [gradient[i] for i in permutation]))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.shifts])
@given(rows=batches(), constant=st.floats(-3, 3))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_adding_a_constant_to_all_log_probs_changes_nothing(case, rows, constant):
    options, segments = CASES[case].options, CASES[case].takes_segments

    def shifted(values):
        return [value + constant for value in values]

    moved = [replace(r, new=shifted(r.new), old=shifted(r.old), rollout=shifted(r.rollout)) for r in rows]
    # x + c is rounded, so a ratio moves by 1e-15; one that sits on its bound (on-policy, eps = 0) is not drawn here.
    agree(run(moved, options, segments=segments), run(rows, options, segments=segments), (1e-11, 1e-12))


def test_nothing_trained_is_a_loss_of_zero_with_a_gradient_of_zero():
    for name, case in CASES.items():
        rows = [Row([], [], [], 1.0)] * 2
        loss, gradient, metrics = run(rows, case.options, padding=3, segments=case.takes_segments)
        assert (loss, gradient, metrics["tokens"]) == (0.0, [[], []], 0.0), name


def test_advantages_may_be_given_per_token():
    logprobs = torch.randn(2, 3, dtype=torch.float64)
    common = {"logprobs": logprobs, "old_logprobs": logprobs, "loss_mask": torch.ones(2, 3, dtype=torch.bool)}
    one = megatron_rl.policy_loss("grpo", advantages=torch.tensor([1.0, 2.0]), **common)
    many = megatron_rl.policy_loss("grpo", advantages=torch.tensor([[1.0] * 3, [2.0] * 3]), **common)
    assert one.loss == many.loss
    assert one.loss.item() == pytest.approx(-1.5, abs=1e-15)


def test_low_precision_log_probs_are_widened():
    logprobs = torch.tensor([[-8.0, -7.9]], dtype=torch.bfloat16, requires_grad=True)
    result = megatron_rl.policy_loss(
        "gspo",
        logprobs=logprobs,
        old_logprobs=torch.tensor([[-8.0, -7.9]]),
        advantages=torch.ones(1),
        loss_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert logprobs.grad is not None


WRONG = [
    ("grpoo", 'no such objective.name: "grpoo" (in the objective of policy_loss); did you mean "grpo"?'),
    (
        {"name": "grpo", "clp_low": 1},
        "unknown key objective.clp_low: 1 (in the objective of policy_loss); did you mean objective.clip_low?",
    ),
    ({"clip_low": 1}, 'objective.name is not set (in the objective of policy_loss); write one of "aspo", '),
    ({"name": "grpo", "clip_low": -1}, "objective.clip_low: -1"),
    ({"name": "grpo", "aggregation": "constant"}, "normalizer = <tokens>"),
    ({"name": "grpo", "normalizer": 3}, "normalizer = <tokens>"),
    ({"name": "espo", "quantiles": [0.5], "thresholds": [0.5]}, "quantiles and thresholds"),
    ({"name": "espo", "alpha": 0.1, "fixed_window": 0.1}, "keep one of the two windows"),
    ({"name": "espo", "clip_low": 0.1}, "unknown key objective.clip_low"),
    ({"name": "grpo", "kl": {"coef": 1}}, "unknown key kl.coef: 1"),
    ({"name": "grpo", "kl": {"coefficient": 1}}, "needs ref_logprobs"),
    ({"name": "grpo", "correction": {"kind": "tis"}}, "needs rollout_logprobs"),
    ({"name": "grpo", "correction": {"kind": "mis", "low": 3}}, "raise high"),
    ("dppo", "rollout_logprobs"),
    ("espo", "entropies"),
    ({"name": "sspo"}, "segment_ids"),
    ({"name": "sspo", "scale_min": 3}, "swap them"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_say_what_to_write(options, message):
    tensor = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        megatron_rl.policy_loss(
            options, logprobs=tensor, old_logprobs=tensor, advantages=torch.ones(1), loss_mask=torch.ones(1, 2) > 0
        )


def test_espo_needs_the_vocabulary_size():
    tensor = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="vocab_size"):
        megatron_rl.policy_loss(
            "espo",
            logprobs=tensor,
            old_logprobs=tensor,
            advantages=torch.ones(1),
            loss_mask=torch.ones(1, 2) > 0,
            entropies=tensor,
        )


def test_wrong_shapes_and_segment_ids_are_named():
    tensor, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    common = {"logprobs": tensor, "old_logprobs": tensor, "advantages": torch.ones(2), "loss_mask": mask}
    wrongs: list[tuple[dict[str, Tensor], str]] = [
        ({"old_logprobs": torch.zeros(2, 3)}, "logprobs is"),
        ({"advantages": torch.ones(3)}, "advantages is"),
        ({"loss_mask": mask[0]}, "loss_mask is"),
        ({"logprobs": torch.zeros(2)}, "logprobs is"),
        ({"segment_ids": tensor}, "segment_ids is"),
        ({"segment_ids": torch.tensor([[0, -1], [0, 0]])}, "negative at a token"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            megatron_rl.policy_loss("gspo", **{**common, **wrong}, vocab_size=None, state=None, totals=None)
    with pytest.raises(ConfigError, match="ratios are per token"):
        megatron_rl.policy_loss("sapo", **common, segment_ids=torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["grpo", "espo", "sspo", "gspo"])
def test_what_check_recommends_for_a_lag_bounds_the_gradient_of_a_token_that_became_unlikely(name):
    """Sampled with probability 0.5 by older weights, e^-20 where the step began, pushed up to e^-1 by its updates."""

    new_BS = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    value = {"rollout_logprobs": math.log(0.5), "old_logprobs": -20.0, "advantages": -1.0, "entropies": 1.0}
    columns = {key: torch.full((1, 1), number, dtype=torch.float64) for key, number in value.items()}
    ids_BS = torch.zeros(1, 1, dtype=torch.int64) if name == "sspo" else None

    def gradient(**options: Option) -> float:
        mask_BS = torch.ones(1, 1, dtype=torch.bool)
        made = megatron_rl.policy_loss(
            {"name": name, **options},
            logprobs=new_BS,
            loss_mask=mask_BS,
            segment_ids=ids_BS,
            vocab_size=32,
            state=None,
            totals=None,
            **columns,
        )
        return float(torch.autograd.grad(made.loss, new_BS)[0])

    assert gradient() == pytest.approx(math.exp(19))
    assert gradient(dual_clip=3) == 0
    assert gradient(correction={"kind": "tis"}) == pytest.approx(2 * math.exp(-1))
