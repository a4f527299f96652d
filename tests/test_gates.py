"""Gates, the off-policy sequence mask and the mask of truncated responses."""

import math
import re

import pytest
import torch

import megatron_rl
from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.gates import Gate
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import GRPO, OBJECTIVES
from megatron_rl.api import Option
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch
from megatron_rl.errors import ConfigError
from tests.oracle.gates import is_dropped

NEW = [[-0.7, -0.55, -1.9, -0.5], [-0.68, -1.8], [-0.55, -2.0, -0.89]]
OLD = [[-1, -0.5, -2, -0.1], [-0.7, -1.5], [-0.3, -2.5, -0.9]]
ROLLOUT = [[-1.2, -0.6, -2.1, -0.3], [-0.5, -1.4], [-0.31, -2.9, -0.8]]
A = [1.0, -1.0, 0.5]
UNITS = {
    "token": [[[t] for t in range(len(row))] for row in NEW],
    "segment": [[[0, 1], [2, 3]], [[0, 1]], [[0], [1, 2]]],
    "sequence": [[list(range(len(row)))] for row in NEW],
}
"""Tokens per unit, per response."""
SEGMENT_IDS = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1])


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def batch(**columns: torch.Tensor) -> Batch:
    base = {
        "loss_mask_T": torch.ones(9, dtype=torch.bool),
        "old_logprobs_T": flat(OLD),
        "rollout_logprobs_T": flat(ROLLOUT),
        "advantages_B": torch.tensor(A, dtype=torch.float64),
    }
    return Batch(torch.tensor([4, 2, 3]), base | columns)


def padded(rows: list[list[float]], fill: float = math.nan) -> torch.Tensor:
    return torch.tensor([row + [fill] * (4 - len(row)) for row in rows], dtype=torch.float64)


def run(options: dict[str, Option], rollout: list[list[float]] = OLD, advantages: list[float] = A):
    """Return (loss, gradient per response, metrics) of ``policy_loss`` on the base case."""
    logprobs = padded(NEW).requires_grad_()
    mask = torch.tensor([[t < len(row) for t in range(4)] for row in NEW])
    result = megatron_rl.policy_loss(
        options,
        logprobs=logprobs,
        old_logprobs=padded(OLD),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=mask,
        rollout_logprobs=padded(rollout),
        state=None,
    )
    result.loss.backward()
    assert logprobs.grad is not None
    return result.loss.item(), [g[m].tolist() for g, m in zip(logprobs.grad, mask, strict=True)], result.metrics


def test_known_weights_of_the_bands():
    """Ratios of 1.648721, 3.320117 and .904837 of trainer to engine."""
    logs = torch.tensor([0.5, 1.2, -0.1], dtype=torch.float64)
    columns = {
        "loss_mask_T": torch.ones(3, dtype=torch.bool),
        "old_logprobs_T": logs - 4,
        "rollout_logprobs_T": torch.full((3,), -4.0, dtype=torch.float64),
        "advantages_B": torch.ones(1, dtype=torch.float64),
    }
    known = {
        ("icepop", 5.0): [1.648721, 3.320117, 0.904837],
        ("icepop", 2.0): [1.648721, 0, 0.904837],
        ("binary", 2.0): [1, 0, 1],
    }
    for (kind, high), expected in known.items():
        weights_T = prepare(
            Batch(torch.tensor([3]), columns), GRPO(), Correction.model_validate({"kind": kind, "high": high})
        )
        assert weights_T["corrections_T"].tolist() == pytest.approx(expected, abs=5.1e-7)
    # float32 has no 1.1: a cap that passed through it would be 1.1 + 2e-8.
    capped = prepare(Batch(torch.tensor([3]), columns), GRPO(), Correction(kind="tis", high=1.1))["corrections_T"]
    assert capped[:2].tolist() == pytest.approx([1.1, 1.1], rel=1e-15)


TWO_GATES: dict[str, Option] = {
    "token": {"level": "token", "policy": "current", "low": 0.8, "high": 1.28},
    "trajectory": {"policy": "current", "low": 0.9, "high": 1.1},
}


def test_known_answer_of_two_gates():
    options: dict[str, Option] = {"name": "reinforce", "correction": {"gates": TWO_GATES}}
    loss, gradient, metrics = run(options)
    assert loss == pytest.approx(0.321666666667, abs=5.1e-13)
    expected = [[0, -0.111111111111, -0.111111111111, 0], [0, 0], [0, 0, -0.055555555556]]
    for row, values in zip(gradient, expected, strict=True):
        assert row == pytest.approx(values, abs=5.1e-13)
    assert metrics["gate/token"] == pytest.approx(5 / 9)
    assert metrics["gate/trajectory"] == pytest.approx(2 / 9)


CHOICES = [
    (measure, reduction)
    for measure, reductions in {"ratio": ("product", "geometric", "max")}.items()
    for reduction in reductions
] + [(measure, reduction) for measure in ("kl", "tv", "k3") for reduction in ("mean", "max")]
BOUNDS = {"ratio": (0.75, 1.3), "kl": (0.0, 0.0305), "tv": (0.01, 0.093), "k3": (0.0, 0.1)}


@pytest.mark.parametrize("level", UNITS)
@pytest.mark.parametrize(("measure", "reduction"), CHOICES)
@pytest.mark.parametrize("policy", ["old", "current"])
def test_gates_equal_the_transcription(level, measure, reduction, policy):
    low, high = BOUNDS[measure]
    gate = Gate(level=level, measure=measure, reduction=reduction, policy=policy, low=low, high=high)
    trainer = OLD if policy == "old" else NEW
    expected: list[float] = []
    for row, mu, units in zip(trainer, ROLLOUT, UNITS[level], strict=True):
        for unit in units:
            out = is_dropped([row[t] for t in unit], [mu[t] for t in unit], measure, reduction, low, high)
            expected += [float(out)] * len(unit)
    whole = batch(current_logprobs_T=flat(NEW))
    columns = prepare(whole, GRPO(), Correction(gates={"it": gate}), segment_ids_T=SEGMENT_IDS)
    assert columns["extra_gate_it_T"].tolist() == expected
    assert columns["corrections_T"].tolist() == [1 - out for out in expected]


@pytest.mark.parametrize("measure", BOUNDS)
def test_the_transcription_tells_the_gates_apart(measure):
    """Bounds that nothing or everything exceeds would show nothing."""
    low, high = BOUNDS[measure]
    drops = {}
    for level, reduction in (("token", None), ("sequence", None), ("sequence", "max")):
        gate = Gate(level=level, measure=measure, reduction=reduction, policy="current", low=low, high=high)
        columns = prepare(batch(current_logprobs_T=flat(NEW)), GRPO(), Correction(gates={"it": gate}))
        drops[level, reduction] = tuple(columns["extra_gate_it_T"].tolist())
    assert len(set(drops.values())) == 3
    assert all(0 < drops[level, None].count(1.0) < 9 for level in ("token", "sequence"))


def test_bounds_of_a_gate_are_inclusive():
    ratio = float(torch.tensor(0.25, dtype=torch.float64).exp())
    gate = Gate(level="token", low=ratio, high=ratio)
    whole = batch(old_logprobs_T=torch.full((9,), -1.0).double(), rollout_logprobs_T=torch.full((9,), -1.25).double())
    assert prepare(whole, GRPO(), Correction(gates={"it": gate}))["extra_gate_it_T"].sum() == 0


def test_a_gate_and_a_weight_multiply():
    gate = Gate(low=0.95, high=1.3)
    weighted = prepare(batch(), GRPO(), Correction(kind="tis", high=1.15))["corrections_T"]
    columns = prepare(batch(), GRPO(), Correction(kind="tis", high=1.15, gates={"geometric": gate}))
    assert torch.equal(columns["corrections_T"], weighted * (1 - columns["extra_gate_geometric_T"]))
    assert 0 < columns["extra_gate_geometric_T"].sum() < 9


def test_dropped_tokens_keep_the_denominators_and_the_kl():
    kl, whole = ReferenceKL(coefficient=0.3), batch(ref_logprobs_T=flat(ROLLOUT))
    new_R = flat(NEW).requires_grad_()

    def value(correction: Correction, kl: ReferenceKL | None = None) -> tuple[float, dict[str, float]]:
        inputs = LossInputs.gather(whole.add(prepare(whole, GRPO(), correction)))
        loss = make_loss(GRPO(), kl)(new_R, torch.zeros(9), inputs)
        return loss.value.item(), summary(loss.metrics)

    everything = Correction(gates={"all": Gate(level="token", high=1e-6)})
    assert value(everything)[0] == 0
    penalty = value(Correction(), kl)[0] - value(Correction())[0]
    loss, metrics = value(everything, kl)
    assert loss == pytest.approx(penalty, rel=1e-12)
    assert metrics["gate/all"] == 1
    assert metrics["tokens"] == 9


@pytest.mark.parametrize(("delta", "dropped"), [(0.139, True), (0.141, False)])
def test_opsm_drops_a_negative_response_that_became_unlikely(delta, dropped):
    """The means of old - current log-prob are .0125, .14 and -.0867; only response 1 has a negative advantage."""
    _, gradient, metrics = run({"name": "reinforce", "correction": {"opsm_delta": delta}})
    assert (gradient[1] == [0, 0]) is dropped
    assert all(gradient[0])
    assert all(gradient[2])
    assert metrics["gate/opsm"] == pytest.approx(dropped * 2 / 9)


def test_opsm_spares_positive_responses():
    _, gradient, metrics = run({"name": "reinforce", "correction": {"opsm_delta": 0.01}}, advantages=[1.0, 1.0, 0.5])
    assert all(all(row) for row in gradient)
    assert metrics["gate/opsm"] == 0


def test_opsm_against_the_engine_measures_the_engine():
    """With the engine's log-probs 1 lower, no response has become unlikely."""
    shifted = [[value - 1 for value in row] for row in OLD]
    options: dict[str, Option] = {"name": "reinforce", "correction": {"opsm_delta": 0.1, "opsm_anchor": "rollout"}}
    assert run(options, rollout=shifted)[2]["gate/opsm"] == 0
    assert run(options, rollout=OLD)[2]["gate/opsm"] == pytest.approx(2 / 9)


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo"])
def test_truncated_responses_leave_the_loss_and_stay_in_the_denominators(name):
    objective = OBJECTIVES[name]()
    kl = ReferenceKL(coefficient=0.3)
    whole = batch(truncated_B=torch.tensor([False, True, False]), ref_logprobs_T=flat(ROLLOUT))

    def loss(batch: Batch, correction: Correction | None = None):
        new_T = flat(NEW).requires_grad_()
        inputs = LossInputs.gather(batch.add(prepare(batch, objective, correction)))
        result = make_loss(objective, kl)(new_T, torch.zeros(9), inputs)
        return result, torch.autograd.grad(result.value, new_T)[0]

    (plain, plain_T), (masked, masked_T) = loss(whole), loss(whole, Correction(mask_truncated=True))
    kept_T = torch.tensor([True] * 4 + [False] * 2 + [True] * 3)
    assert torch.equal(masked_T, torch.where(kept_T, plain_T, 0))
    assert plain_T[~kept_T].all()
    metrics = summary(masked.metrics)
    assert metrics["gate/truncated"] == pytest.approx(2 / 9)
    assert metrics["tokens"] == 9
    assert masked.value.item() != plain.value.item()


def test_parts_of_a_mini_batch_are_dropped_as_the_whole():
    whole = batch(current_logprobs_T=flat(NEW), truncated_B=torch.tensor([True, False, False]))
    correction = Correction.model_validate(
        {"kind": "icepop", "low": 0.8, "high": 1.2, "gates": TWO_GATES, "opsm_delta": 0.1, "mask_truncated": True}
    )
    together = prepare(whole, GRPO(), correction)
    for response, positions in enumerate(([0, 1, 2, 3], [4, 5], [6, 7, 8])):
        alone = prepare(whole.select([response]), GRPO(), correction)
        for name in ("corrections_T", *(name for name in together if "gate" in name)):
            assert torch.equal(alone[name], together[name][positions]), name


WRONG: list[tuple[dict[str, object], str]] = [
    ({"gates": {"it": {}}}, "has no bound and keeps everything: set low, high or both"),
    ({"gates": {"it": {"low": 2.0, "high": 1.0}}}, "swap them"),
    ({"gates": {"it": {"high": 1.0, "measure": "kl", "reduction": "product"}}}, 'write "mean" or "max"'),
    ({"gates": {"it": {"high": 1.0, "reduction": "mean"}}}, 'write "product" or "geometric" or "max"'),
    ({"gates": {"opsm": {"high": 1.0}}}, "gates.opsm: write another name"),
    ({"kind": "bypass", "gates": {"it": {"high": 1.0}}}, 'write gates.it.policy = "current"'),
    ({"kind": "icepop", "low": 7.0}, "raise high"),
    ({"mask_truncated": True}, "leave truncated responses out of loss_mask"),
]


@pytest.mark.parametrize(("correction", "message"), WRONG)
def test_wrong_options_say_what_to_write(correction, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run({"name": "grpo", "correction": correction})


def test_gates_without_the_engines_log_probs_are_an_error():
    tensor = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="a gate of correction needs rollout_logprobs"):
        megatron_rl.policy_loss(
            {"name": "grpo", "correction": {"gates": {"it": {"high": 1.0}}}},
            logprobs=tensor,
            old_logprobs=tensor,
            advantages=torch.ones(1),
            loss_mask=torch.ones(1, 2) > 0,
        )
