"""From groups to columns, where a response has tokens of several versions of the weights."""

import math

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.loss import prepare
from megatron_rl.algorithms.objectives import GRPO
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.observability.step_metrics import StepMetrics
from megatron_rl.rollout.collect import collect
from megatron_rl.tasks.base import Verdict

RUN = load(Run, [], ["model.path=x"]).run
MIXED = Response(
    "0.4/p/0", "p", 0, np.array((5, 6, 7)), np.array((-1.0, -2.0, -3.0)), "", "stop", ((2, 0, 1), (4, 1, 3))
)
FRESH = Response("0.4/p/1", "p", 1, np.array((8, 9)), np.array((-0.5, -0.25)), "", "stop", ((4, 0, 2),))


@pytest.fixture
def batch():
    group = Group(Prompt("p", (1, 2), "", ""), (MIXED, FRESH))
    return collect([group], [[Verdict(1.0, True), Verdict(0.0, False)]], RUN)


def test_every_token_keeps_the_version_and_the_logprob_of_the_weights_that_made_it(batch):
    assert batch["weight_versions_T"].tolist() == [-1, -1, 2, 4, 4, -1, -1, 4, 4]
    assert batch["rollout_logprobs_T"].tolist() == [0, 0, -1, -2, -3, 0, 0, -0.5, -0.25]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_correction_is_against_the_weights_that_made_each_token(batch, level):
    gaps = [0.3, -0.1, 0.2, 0.05, -0.4]
    old_T = batch["rollout_logprobs_T"].double().index_add(0, batch.trained_R, torch.tensor(gaps).double())
    scored = batch.add({"old_logprobs_T": old_T})
    columns = prepare(scored, GRPO(), Correction(kind="mis", level=level, low=0.1, high=10))
    expected = gaps if level == "token" else [sum(gaps[:3])] * 3 + [sum(gaps[3:])] * 2
    found = columns["corrections_T"][batch.trained_R].tolist()
    assert found == pytest.approx([math.exp(gap) for gap in expected], rel=1e-6)  # log-probs come as float32


def test_lags_are_counted_by_token_and_mixtures_by_response(batch):
    metrics = StepMetrics()
    metrics.rollout(5, batch.outline(), {})
    values = metrics.summary()
    assert (values["lag_mean"], values["lag_max"]) == (pytest.approx((3 + 4 * 1) / 5), 3)
    assert values["mixed_versions_fraction"] == 0.5
