"""The loss of packed micro-batches: splits, context ranks, corrections, KL and metrics."""

import math
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.correction import Correction, mismatch
from megatron_rl.algorithms.kl import ReferenceKL, k3
from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import CISPO, ESPO, GRPO, GSPO, SSPO, Objective
from megatron_rl.algorithms.objectives import OBJECTIVES as REGISTERED
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError
from tests.oracle.objectives import CASES
from tests.ranks import run_ranks

VOCABULARY = Vocabulary(50, [b"a", b" b", b".", b",", b"\n", b" c"] * 8, frozenset([49]))
OBJECTIVES = {
    name: REGISTERED[str(case.options["name"])].model_validate(case.options) for name, case in CASES.items()
} | {
    "lpo sentence": SSPO(granularity="sentence", entropy_scale="none", aggregation="token"),
    "espo high": ESPO(alpha=0.5, quantiles=(0.3, 0.7), high_only=True),
}
EXACT = {"rtol": 1e-12, "atol": 1e-14}
"""float64; only the order of a few dozen additions differs."""


def batch_of(lengths: list[int], seed: int = 0, step: float = 0.1) -> tuple[Batch, Tensor]:
    """Return a mini-batch with prompts, gaps and one response that is not trained, and new log-probs over T."""
    random = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def noise() -> Tensor:
        return torch.randn(total, generator=random, dtype=torch.float64)

    lengths_B = torch.tensor(lengths)
    starts_B = lengths_B.cumsum(0) - lengths_B
    mask_T = torch.rand(total, generator=random) < 0.8
    mask_T[starts_B] = False
    mask_T[starts_B[1] : starts_B[1] + lengths[1]] = False
    old_T = -noise().abs() - 0.01
    columns = {
        "input_ids_T": torch.randint(0, 48, (total,), generator=random),
        "loss_mask_T": mask_T,
        "old_logprobs_T": old_T,
        "rollout_logprobs_T": (old_T + 0.3 * noise()).clamp(max=-1e-3),
        "ref_logprobs_T": old_T + 0.5 * noise(),
        "old_entropies_T": noise().abs(),
        "advantages_B": torch.tensor([1.0, -1.0, 0.5, -0.3])[torch.arange(len(lengths)) % 4].double(),
    }
    return Batch(lengths_B, columns), (old_T + step * noise()).clamp(max=-1e-4)


def evaluate(objective: Objective, inputs: LossInputs, logprobs_R: Tensor, kl: ReferenceKL | None = None):
    """Return (loss, gradient, metrics) of one micro-batch."""
    leaf_R = logprobs_R.clone().requires_grad_()
    loss = make_loss(objective, kl)(leaf_R, torch.ones_like(leaf_R), inputs)
    loss.value.backward()
    assert leaf_R.grad is not None
    return loss.value.item(), leaf_R.grad, loss.metrics


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3], [4]], [[4, 1], [0, 3, 2]], [[1], [3, 0, 2, 4]]])
def test_any_split_into_micro_batches_adds_up_to_the_whole(name, parts):
    objective, kl = OBJECTIVES[name], ReferenceKL(coefficient=0.1)
    batch, new_T = batch_of([9, 4, 7, 12, 5])
    batch = batch.add(prepare(batch, objective, Correction(kind="tis", level="sequence"), VOCABULARY))
    whole = evaluate(objective, LossInputs.gather(batch), new_T[batch.trained_R], kl)

    batch = batch.add({"extra_new_T": new_T, "extra_place_T": torch.arange(len(new_T))})
    gradient_T, value, largest = torch.zeros_like(new_T), 0.0, 0.0
    sums: dict[str, Tensor] = {}
    for part in parts:
        inputs = LossInputs.gather(batch.select(part))
        loss, gradient_R, metrics = evaluate(objective, inputs, inputs.extra["new"], kl)
        value += loss
        gradient_T[inputs.extra["place"]] = gradient_R
        sums = {key: sums.get(key, torch.zeros_like(total)) + total for key, total in metrics.sums.items()}
        largest = max(largest, metrics.maxima["ratio"].item())
    assert value == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(gradient_T[batch.trained_R], whole[1], **EXACT)
    torch.testing.assert_close(sums, dict(whole[2].sums), **EXACT)
    assert largest == whole[2].maxima["ratio"].item()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[1], [0, 2, 4], [3]], [[0, 3, 4, 2], [], [1]]])
def test_parts_of_a_minibatch_are_prepared_as_in_the_whole(name, parts):
    objective, correction = OBJECTIVES[name], Correction(kind="tis", level="segment")
    batch, _ = batch_of([9, 4, 7, 12, 5])
    totals: list[Tensor] = []

    def record(values: Tensor) -> Tensor:
        totals.append(values)
        return values

    whole = batch.add(prepare(batch, objective, correction, VOCABULARY, total=record))
    summands: list[list[Tensor]] = []
    for part in parts:
        given = iter(totals)
        asked: list[Tensor] = []

        def total(values: Tensor, given: Iterator[Tensor] = given, asked: list[Tensor] = asked) -> Tensor:
            asked.append(values)
            return next(given)

        found = prepare(batch.select(part), objective, correction, VOCABULARY, total=total)
        expected = whole.select(part)
        for column in found.keys() - {"segment_ids_T"}:  # numbered from 0 in each part
            torch.testing.assert_close(found[column], expected[column], **EXACT)
        summands.append(asked)
    for wanted, terms in zip(totals, zip(*summands, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(terms).sum(0), wanted, **EXACT)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_entropies_get_no_gradient(name):
    """Windows and weights come from the old policy's entropies; the current ones are for the journal alone."""
    batch, new_T = batch_of([9, 4, 7, 12, 5], step=0.5)
    batch = batch.add(prepare(batch, OBJECTIVES[name], Correction(), VOCABULARY))
    logprobs_R, entropies_R = (
        new_T[batch.trained_R].requires_grad_(),
        torch.ones(len(batch.trained_R), requires_grad=True),
    )
    make_loss(OBJECTIVES[name])(logprobs_R, entropies_R, LossInputs.gather(batch)).value.backward()
    assert logprobs_R.grad is not None
    assert entropies_R.grad is None


def context_share(inputs: LossInputs, rank: int, size: int) -> Tensor:
    """Return which tokens of a row a rank holds, zig-zag; the last of three ranks holds none."""
    if size == 3:
        return torch.arange(len(inputs.weights_R)) % 2 == rank
    chunks = torch.arange(len(inputs.weights_R)) * 2 * size // len(inputs.weights_R)
    return (chunks == rank) | (chunks == 2 * size - 1 - rank)


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_context_ranks_give_the_loss_and_gradient_of_one_rank(size):
    batch, new_T = batch_of([9, 4, 17, 12])
    all_inputs = {}
    for name, objective in OBJECTIVES.items():
        columns = prepare(batch, objective, Correction(kind="mis", level="segment"), VOCABULARY)
        all_inputs[name] = LossInputs.gather(batch.add(columns))
    new_R = new_T[batch.trained_R]

    def on_rank():
        results = {}
        for name, inputs in all_inputs.items():
            mine_R = context_share(inputs, dist.get_rank(), size)
            share = replace(inputs.map(itemgetter(mine_R)), context_group=dist.group.WORLD)
            results[name] = mine_R, *evaluate(OBJECTIVES[name], share, new_R[mine_R])
        return results

    ranks = run_ranks(on_rank, size)
    for name, inputs in all_inputs.items():
        value, gradient_R, metrics = evaluate(OBJECTIVES[name], inputs, new_R)
        merged_R = torch.zeros_like(gradient_R)
        for result in ranks:
            merged_R[result[name][0]] = result[name][2]
        assert sum(result[name][1] for result in ranks) == pytest.approx(value, rel=1e-12), name
        torch.testing.assert_close(merged_R, gradient_R, **EXACT)
        sums = {key: sum(result[name][3].sums[key] for result in ranks) for key in metrics.sums}
        torch.testing.assert_close(sums, dict(metrics.sums), **EXACT)


def test_a_micro_batch_without_trained_tokens_still_has_a_gradient_path():
    for name, objective in OBJECTIVES.items():
        batch, _ = batch_of([3, 4])
        batch = batch.add({"loss_mask_T": torch.zeros(7, dtype=torch.bool)})
        inputs = LossInputs.gather(batch.add(prepare(batch, objective, vocabulary=VOCABULARY)))
        parameter = torch.ones((), requires_grad=True)
        logprobs_R = parameter * torch.zeros(0)
        loss = make_loss(objective)(logprobs_R, logprobs_R, inputs)
        loss.value.backward()
        assert loss.value.item() == 0, name
        assert parameter.grad is not None, name
        assert parameter.grad.item() == 0, name
        assert set(summary(loss.metrics).values()) == {0.0}, name


def test_the_first_step_has_every_ratio_exactly_one_in_float32():
    for name, objective in OBJECTIVES.items():
        batch, _ = batch_of([9, 4, 7, 12], step=0.0)
        columns = {key: column.float() for key, column in batch.columns.items() if column.dtype == torch.float64}
        columns["rollout_logprobs_T"] = columns["old_logprobs_T"]
        batch = batch.add(columns)
        inputs = LossInputs.gather(batch.add(prepare(batch, objective, vocabulary=VOCABULARY)))
        values = summary(evaluate(objective, inputs, inputs.old_logprobs_R)[2])
        assert values["ratio_mean"] == values["ratio_max"] == 1.0, name
        assert values["clipped_fraction"] == 0.0, name


LOG_WEIGHTS = [0.1, -0.2, 3.0, -2.0, 0.4]
"""log old - log rollout of five tokens: responses of three and two; segments {0, 1}, {2}, {3, 4}."""


def reference_weight(correction: Correction, log_weight: float) -> float:
    weight, cap = math.exp(log_weight), correction.cap
    if correction.kind == "tis":
        return min(weight, cap)
    inside = correction.low <= weight <= cap
    return (1.0 if correction.kind == "binary" else weight) if inside else 0.0


@pytest.mark.parametrize("kind", ["tis", "mis", "icepop", "binary"])
@pytest.mark.parametrize("level", ["token", "segment", "sequence"])
@pytest.mark.parametrize("reduction", ["product", "geometric"])
def test_correction_weights_equal_the_formula(kind, level, reduction):
    correction = Correction(kind=kind, level=level, reduction=reduction, high=4.0)
    shared = {"token": [[0], [1], [2], [3], [4]], "segment": [[0, 1], [2], [3, 4]], "sequence": [[0, 1, 2], [3, 4]]}
    expected = [0.0] * 5
    for group in shared[level]:
        total = sum(LOG_WEIGHTS[t] for t in group)
        for t in group:
            expected[t] = reference_weight(correction, total / len(group) if reduction == "geometric" else total)
    batch = Batch(
        torch.tensor([3, 2]),
        {
            "loss_mask_T": torch.ones(5, dtype=torch.bool),
            "old_logprobs_T": torch.tensor(LOG_WEIGHTS).double() - 4,
            "rollout_logprobs_T": torch.full((5,), -4.0).double(),
            "advantages_B": torch.tensor([1.0, -1.0]),
        },
    )
    columns = prepare(batch, GRPO(), correction, segment_ids_T=torch.tensor([0, 0, 1, 0, 0]))
    # LOG_WEIGHTS went through float32.
    assert columns["corrections_T"].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_correction_by_segments_is_by_tokens_where_the_objective_has_none():
    batch, _ = batch_of([9, 4, 7, 12])
    by_segment, by_token, by_response = (
        prepare(batch, GRPO(), Correction(kind="tis", level=level))["corrections_T"]
        for level in ("segment", "token", "sequence")
    )
    assert torch.equal(by_segment, by_token)
    assert not torch.equal(by_segment, by_response)


def test_correction_multiplies_the_policy_term_and_not_the_kl():
    batch, new_T = batch_of([9, 4, 7])
    kl = ReferenceKL(coefficient=0.7)
    plain = LossInputs.gather(batch.add(prepare(batch, GRPO())))
    halved = replace(plain, corrections_R=torch.full_like(plain.weights_R, 0.5))
    new_R = new_T[batch.trained_R]
    policy = evaluate(GRPO(), plain, new_R)[0]
    both = evaluate(GRPO(), plain, new_R, kl)[0]
    assert evaluate(GRPO(), halved, new_R, kl)[0] == pytest.approx(0.5 * policy + (both - policy), rel=1e-12)


def test_bypass_takes_the_rollout_log_probs_for_the_old_ones():
    batch, new_T = batch_of([9, 4, 7])
    bypassed = LossInputs.gather(batch.add(prepare(batch, GSPO(), Correction(kind="bypass"))))
    moved = batch.add({"old_logprobs_T": batch["rollout_logprobs_T"]})
    moved = LossInputs.gather(moved.add(prepare(moved, GSPO())))
    new_R = new_T[batch.trained_R]
    assert evaluate(GSPO(), bypassed, new_R)[0] == evaluate(GSPO(), moved, new_R)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_reference_kl_equals_its_formula_and_slope(estimator):
    kl = ReferenceKL(coefficient=1.0, estimator=estimator)
    for d in (-3.0, -0.2, 0.0, 1.7):
        logprob = torch.tensor([d - 1.0], dtype=torch.float64, requires_grad=True)
        value = kl.cost(logprob, torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-5.0], dtype=torch.float64))
        value.sum().backward()
        formula = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1, "abs": abs(d)}[estimator]
        slope = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d), "abs": float((d > 0) - (d < 0))}[estimator]
        assert value.item() == pytest.approx(formula, abs=1e-14)
        assert logprob.grad is not None
        assert logprob.grad.item() == pytest.approx(slope, abs=1e-14)


def test_known_answer_of_the_unbiased_kl():
    """The base case with a token mean; the reference is the old policy moved by -.1, .1, -.1, ... in each response."""
    old = torch.tensor([-1, -0.5, -2, -0.1, -0.7, -1.5, -0.3, -2.5, -0.9], dtype=torch.float64)
    new = [-0.7, -0.55, -1.9, -0.5, -0.68, -1.8, -0.55, -2.0, -0.89]
    shift = torch.tensor([-0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1], dtype=torch.float64)
    new_R = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    value = ReferenceKL(coefficient=1.0, unbiased=True).cost(new_R, old + shift, old).mean()
    value.backward()
    assert value.item() == pytest.approx(0.048078204046, abs=5.1e-13)
    assert new_R.grad is not None
    known = [0.059993724781, -0.015853823742, 0.024559353735, -0.037240002558, 0.013602684534, -0.032925254253]
    assert new_R.grad.tolist() == pytest.approx([*known, -0.012980013051, 0.073276500920, 0.012345057598], abs=5.1e-13)


def test_the_unbiased_kl_has_the_gradient_of_the_kl_divergence():
    """The mean over the old policy's tokens of the gradient by the logits, against that of the divergence itself."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5, 1.0], dtype=torch.float64), 0)
    ref = torch.log_softmax(torch.tensor([1.0, 0.2, 0.0, -1.0], dtype=torch.float64), 0)

    def gradient(unbiased: bool) -> Tensor:
        costs = ReferenceKL(unbiased=unbiased).cost(torch.log_softmax(logits, 0), ref, old)
        return torch.autograd.grad((old.exp() * costs).sum(), logits)[0]

    log_p = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), logits)[0]
    torch.testing.assert_close(gradient(True), exact, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(gradient(False), exact, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"estimator": "k2", "unbiased": True}, 'write "k3"'), ({"refresh_decay": 0.5}, "needs refresh_every")],
)
def test_options_of_the_kl_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ReferenceKL(**options)


def test_k3_clamps_its_exponent_and_not_its_linear_term():
    far = torch.tensor([-1e4, -25.0, 25.0, 1e4], dtype=torch.float64, requires_grad=True)
    value = k3(far)
    value.sum().backward()
    bounds = [math.expm1(-20), math.expm1(-20), math.expm1(20), math.expm1(20)]
    assert value.tolist() == pytest.approx([b - x for b, x in zip(bounds, far.tolist(), strict=True)], rel=1e-14)
    assert far.grad is not None
    assert far.grad.tolist() == [-1.0] * 4


def test_kl_without_a_reference_is_an_error():
    batch, new_T = batch_of([3, 4, 5])
    columns = {key: column for key, column in batch.columns.items() if key != "ref_logprobs_T"}
    batch = Batch(batch.lengths_B, columns)
    inputs = LossInputs.gather(batch.add(prepare(batch, GRPO())))
    with pytest.raises(ConfigError, match="needs ref_logprobs"):
        evaluate(GRPO(), inputs, new_T[batch.trained_R], ReferenceKL(coefficient=0.1))


def test_summary_forms_means_over_tokens_and_segments_over_responses():
    batch = Batch(
        torch.tensor([4, 2, 2]),
        {
            "loss_mask_T": torch.tensor([True] * 6 + [False] * 2),
            "old_logprobs_T": torch.full((8,), -2.0, dtype=torch.float64),
            "advantages_B": torch.tensor([1.0, -1.0, 1.0]),
        },
    )
    batch = batch.add(prepare(batch, GRPO(), segment_ids_T=torch.tensor([0, 0, 1, 2, 0, 0, 0, 0])))
    shifts = torch.tensor([0.5, 0.5, 0.1, -0.1, 0.2, -0.2], dtype=torch.float64)
    inputs = LossInputs.gather(batch)
    loss = make_loss(GRPO())(shifts - 2.0, torch.arange(6.0), inputs)
    values = summary(loss.metrics)
    ratios = [math.exp(x) for x in (0.5, 0.5, 0.1, -0.1, 0.0, 0.0)]
    assert values["tokens"] == 6
    assert values["responses"] == 2
    assert values["segments"] == 4
    assert values["segments_mean"] == 2
    assert values["entropy_mean"] == 2.5
    assert values["clipped_fraction"] == pytest.approx(2 / 6)
    assert values["ratio_mean"] == pytest.approx(sum(ratios) / 6)
    assert values["ratio_max"] == pytest.approx(math.exp(0.5))
    assert values["loss"] == loss.value.item()
    assert values["policy_kl_mean"] == pytest.approx(sum(math.exp(x) - 1 - x for x in shifts.tolist()) / 6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_fraction_is_the_share_of_tokens_with_a_gradient(name):
    """Over any split, a response with advantage 0 and one whose correction is 0 included."""
    batch, new_T = batch_of([9, 4, 7, 12, 5], step=0.5)
    batch = batch.add({"advantages_B": torch.tensor([1.0, -1.0, 0.5, 0.0, -0.3], dtype=torch.float64)})
    correction = Correction(kind="icepop", low=0.8, high=1.2)
    batch = batch.add({**prepare(batch, OBJECTIVES[name], correction, VOCABULARY), "extra_new_T": new_T})
    left, counted = 0, 0.0
    for part in ([0, 1], [2, 3], [4]):
        inputs = LossInputs.gather(batch.select(part))
        _, gradient_R, metrics = evaluate(OBJECTIVES[name], inputs, inputs.extra["new"])
        left += int((gradient_R != 0).sum())
        counted += float(metrics.sums["trained"])
    assert 0 < left == counted < len(batch.trained_R)


def test_capped_tokens_of_cispo_have_a_gradient_and_clipped_ones_of_grpo_have_none():
    batch, new_T = batch_of([9, 4, 7, 12, 5], step=0.5)
    for objective in (CISPO(clip_high=0.1), GRPO()):
        inputs = LossInputs.gather(batch.add(prepare(batch, objective)))
        values = summary(evaluate(objective, inputs, new_T[batch.trained_R])[2])
        assert values["clipped_fraction"] > 0
        kept = 1.0 if isinstance(objective, CISPO) else 1 - values["clipped_fraction"]
        assert values["gradient_fraction"] == pytest.approx(kept, rel=1e-12)


def test_gradient_kept_is_relative_to_the_gradient_with_ratio_one_and_nothing_corrected():
    """By hand: sum of w |A| r c over unclipped tokens, as a share of the sum of w |A| over all."""
    columns = {
        "loss_mask_T": torch.ones(5, dtype=torch.bool),
        "old_logprobs_T": torch.full((5,), -2.0, dtype=torch.float64),
        "advantages_B": torch.tensor([2.0, -0.5], dtype=torch.float64),
    }
    batch = Batch(torch.tensor([3, 2]), columns)
    inputs = LossInputs.gather(batch.add(prepare(batch, GRPO())))
    corrections = [1.0, 0.5, 1.0, 1.0, 0.25]
    inputs = replace(inputs, corrections_R=torch.tensor(corrections, dtype=torch.float64))
    shifts = [0.1, -0.4, 0.7, 0.9, -0.1]  # the third is clipped
    values = summary(evaluate(GRPO(), inputs, torch.tensor(shifts, dtype=torch.float64) - 2.0)[2])
    weights = [2 / 6, 2 / 6, 2 / 6, 0.5 / 4, 0.5 / 4]
    kept = [w * math.exp(x) * c for w, x, c in zip(weights, shifts, corrections, strict=True)]
    assert values["gradient_kept"] == pytest.approx((sum(kept) - kept[2]) / sum(weights), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in CASES or CASES[name].plain])
def test_gradient_kept_is_one_on_policy_and_sums_over_any_split(name):
    batch, new_T = batch_of([9, 4, 7, 12, 5], step=0.5)
    batch = batch.add({"rollout_logprobs_T": batch["old_logprobs_T"]})
    batch = batch.add({**prepare(batch, OBJECTIVES[name], vocabulary=VOCABULARY), "extra_new_T": new_T})
    whole = LossInputs.gather(batch)
    same = summary(evaluate(OBJECTIVES[name], whole, whole.old_logprobs_R)[2])
    assert same["gradient_kept"] == pytest.approx(1, rel=1e-12)
    kept, plain, absolute = 0.0, 0.0, 0.0
    for part in ([0, 1], [2, 3], [4]):
        inputs = LossInputs.gather(batch.select(part))
        _, gradient_R, metrics = evaluate(OBJECTIVES[name], inputs, inputs.extra["new"])
        kept, plain = kept + float(metrics.sums["gradient"]), plain + float(metrics.sums["plain_gradient"])
        absolute += float(gradient_R.abs().sum())
    assert kept == pytest.approx(absolute, rel=1e-12)
    moved = summary(evaluate(OBJECTIVES[name], whole, whole.extra["new"])[2])
    assert moved["gradient_kept"] == pytest.approx(kept / plain, rel=1e-12)
    assert moved["gradient_kept"] != pytest.approx(1, abs=0.01)


def test_mismatch_of_rollout_and_trainer():
    batch, _ = batch_of([9, 4, 7])
    log_R = (batch["old_logprobs_T"] - batch["rollout_logprobs_T"])[batch.trained_R].tolist()
    values = mismatch(
        batch.add({"rollout_logprobs_T": batch["rollout_logprobs_T"].masked_fill(~batch["loss_mask_T"], math.nan)})
    )
    assert values["mismatch_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in log_R) / len(log_R))
    assert values["mismatch_abs_max"] == max(abs(x) for x in log_R)
    assert values["mismatch_abs_p50"] <= values["mismatch_abs_p99"] <= values["mismatch_abs_max"]
    assert mismatch(Batch(batch.lengths_B, {"loss_mask_T": batch["loss_mask_T"]})) == {}


def test_columns_are_float32_or_wider():
    batch, _ = batch_of([9, 4, 7])
    low = {name: batch[name].float() for name in ("old_logprobs_T", "old_entropies_T", "rollout_logprobs_T")}
    for name, objective in OBJECTIVES.items():
        columns = prepare(batch.add(low), objective, vocabulary=VOCABULARY)
        assert {column.dtype for column in columns.values()} <= {torch.float32, torch.int64}, name
    with pytest.raises(ConfigError, match="old_logprobs_T is bfloat16, expected float32 or float64"):
        batch.add({"old_logprobs_T": batch["old_logprobs_T"].bfloat16()})
