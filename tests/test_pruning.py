"""Pruned responses and ARM in the columns of a mini-batch: denominators, weights, and the tokens of prompts."""

import math

import pytest
import torch

from megatron_rl.algorithms.arm import add_arm, prompts_of
from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.algorithms.objectives import ESPO, GMPO, GRPO, SSPO, Objective
from megatron_rl.algorithms.pruning import drop_pruned
from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.collect import add_pruning
from tests.minibatches import alone

LENGTHS = [4, 6, 3, 5]
WEIGHTS = [1.5, 0.0, 0.75, 0.0]
VOCABULARY = Vocabulary(11, tuple(b"." if token % 3 == 0 else b"a" for token in range(11)))


def step_batch() -> Batch:
    """Return four responses with prompts of two tokens, the second one with a gap, the last one without a response."""
    random, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    lengths_B = torch.tensor(LENGTHS)
    mask_T = torch.ones(total, dtype=torch.bool)
    mask_T[[0, 1, 4, 5, 7, 10, 11, 13, 14, 15, 16, 17]] = False

    def values() -> torch.Tensor:
        return torch.rand(total, generator=random, dtype=torch.float64)

    columns = {
        "input_ids_T": torch.randint(0, 11, (total,), generator=random),
        "loss_mask_T": mask_T,
        "old_logprobs_T": -values(),
        "old_entropies_T": values(),
        "advantages_B": torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64),
        "pruning_weights_B": torch.tensor(WEIGHTS, dtype=torch.float64),
    }
    return Batch(lengths_B, columns)


def pruned(batch: Batch) -> Batch:
    """Return the batch as the loop prunes it: by its outline."""
    outline = drop_pruned(batch.outline())
    remaining = (batch["pruning_weights_B"] > 0).nonzero().flatten()
    rest = batch.select(remaining if len(remaining) else [0])
    return rest.add({name: outline[name] for name in ("unpruned_responses_B", "unpruned_tokens_B")})


@pytest.mark.parametrize(
    "objective",
    [
        GRPO(),
        GRPO(aggregation="token"),
        GRPO(aggregation="sum"),
        GRPO(aggregation="constant", normalizer=7),
        GMPO(),
        ESPO(),
    ],
    ids=lambda objective: f"{objective.name} {getattr(objective, 'aggregation', '')}",
)
def test_the_weights_are_those_before_pruning_times_the_factor_of_the_response(objective: Objective):
    batch = step_batch()
    before = prepare(
        Batch(batch.lengths_B, {**batch.columns, "pruning_weights_B": torch.ones(4)}), objective, None, VOCABULARY
    )
    expected = (before["weights_T"] * torch.repeat_interleave(torch.tensor(WEIGHTS), batch.lengths_B)).double()
    rest = pruned(batch)
    found = prepare(rest, objective, None, VOCABULARY)["weights_T"]
    assert found.tolist() == pytest.approx(expected[batch.token_positions(torch.tensor([0, 2]))].tolist(), rel=1e-14)
    assert found.count_nonzero() == 3


def test_where_all_are_dropped_one_stays_without_a_loss():
    batch = step_batch().add({"pruning_weights_B": torch.zeros(4, dtype=torch.float64)})
    rest = pruned(batch)
    assert len(rest) == 1
    inputs = LossInputs.gather(rest.add(prepare(rest, GRPO())))
    logprobs_R = (inputs.old_logprobs_R + 0.1).requires_grad_()
    loss = make_loss(GRPO())(logprobs_R, torch.zeros(2, dtype=torch.float64), inputs).value
    loss.backward()
    assert loss.item() == 0
    assert logprobs_R.grad is not None
    assert not logprobs_R.grad.any()


def test_without_pruning_the_outline_is_the_same():
    outline = Batch(torch.tensor([3]), {"trained_tokens_B": torch.tensor([2])})
    assert drop_pruned(outline) is outline


def test_means_over_tokens_are_over_those_that_are_left():
    tokens = Tokens.of(rest := pruned(step_batch()))
    assert (tokens.num_responses, tokens.num_tokens, tokens.num_present) == (3, 6, 3)
    assert tokens.mean(tokens["old_entropies_T"]) == pytest.approx(
        rest["old_entropies_T"][rest.trained_R].mean().item()
    )
    plain = Batch(rest.lengths_B, {n: c for n, c in rest.columns.items() if not n.startswith("unpruned")})
    windows = [prepare(each, SSPO(), None, VOCABULARY)["clip_high_T"] for each in (rest, plain)]  # relative to a mean
    assert torch.equal(*windows)


def test_the_draw_is_of_the_seed_and_the_step():
    run = load(Run, [], ["model.path=x", "advantage.pruning=0.7"]).run
    batch = step_batch().select([0, 1, 2, 3] * 8)

    def drawn(step: int, seed: int = 0) -> list[float]:
        seeded = run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})
        return add_pruning(batch, seeded, step)["pruning_weights_B"].tolist()

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(3)), tuple(drawn(4)), tuple(drawn(3, seed=1))}) == 3
    share = (0.7 * torch.tensor([0, 0.5, 0.75, 1])).mean()
    expected = {0.0} | {float((1 - share) / (1 - 0.7 * each)) for each in (0, 0.5, 0.75, 1)}
    assert all(min(abs(weight - each) for each in expected) < 1e-6 for weight in drawn(3))  # float32 above
    assert drawn(3)[::4].count(0.0) == 0  # the largest |A|
    assert add_pruning(batch, load(Run, [], ["model.path=x"]).run, 3) is batch


def test_pruning_before_a_penalty_in_the_rewards_is_refused():
    words = ["model.path=x", "advantage.pruning=0.5", "kl.coefficient=0.1", "kl.placement=reward"]
    with pytest.raises(ConfigError, match="compares the responses of a group after some are dropped"):
        load(Run, [], words)


def test_tokens_of_prompts_are_those_before_the_first_trained_one_that_something_predicts():
    found = prompts_of(alone(step_batch()))["loss_mask_T"]
    # The gap of the second response is no prompt; the last response has no trained token.
    assert found.nonzero().flatten().tolist() == [1, 5, 11, 14, 15, 16, 17]


def test_arm_adds_alpha_times_the_difference_of_the_confidences():
    batch = step_batch()
    prompt_T = torch.zeros(18, dtype=torch.float64)
    prompt_T[[1, 5, 11]] = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64).log()
    minibatch = alone(batch.add({"arm_alphas_B": torch.tensor([0.3, 0.0, 0.3, 0.0], dtype=torch.float64)}))
    found = add_arm(minibatch, prompt_T)["advantages_B"].tolist()
    lowest = min(batch["old_logprobs_T"][[2, 3]].tolist())  # a fifth of two tokens is one
    only = float(batch["old_logprobs_T"][12])
    expected = [1 + 0.3 * (0.2 - math.exp(lowest)), -0.5, 0.25 + 0.3 * (0.4 - math.exp(only)), 0]
    assert found == pytest.approx(expected, abs=1e-14)
