"""A KL penalty in the rewards, over mini-batches and replicas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.algorithms.objectives import GRPO
from megatron_rl.algorithms.reward_kl import penalize_rewards
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.minibatch import Minibatch, MinibatchPlan
from megatron_rl.data.pack import RowRules, pack
from megatron_rl.data.types import Batch
from megatron_rl.errors import ConfigError

LENGTHS = [4, 5, 3, 6, 4, 5]
KL = ReferenceKL(coefficient=0.5, estimator="k1", placement="reward")


def step_batch() -> Batch:
    """Return two groups of three responses with one prompt token each."""
    random, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    lengths_B = torch.tensor(LENGTHS)
    mask_T = torch.ones(total, dtype=torch.bool)
    mask_T[lengths_B.cumsum(0) - lengths_B] = False
    return Batch(
        lengths_B,
        {
            "loss_mask_T": mask_T,
            "old_logprobs_T": -torch.rand(total, generator=random, dtype=torch.float64),
            "ref_logprobs_T": -torch.rand(total, generator=random, dtype=torch.float64),
            "rewards_B": torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64),
            "verified_B": torch.tensor([True, True, True, True, False, True]),
            "group_ids_B": torch.tensor([0, 0, 0, 1, 1, 1]),
            "advantages_B": torch.zeros(6, dtype=torch.float64),
        },
    )


def by_hand(batch: Batch) -> list[float]:
    """R - mean over the verified responses of the group, with the penalty in R, one response at a time."""
    rewards: list[float] = []
    positions = 0
    for response, length in enumerate(LENGTHS):
        tokens = range(positions + 1, positions + length)
        gap = sum(float(batch["old_logprobs_T"][t] - batch["ref_logprobs_T"][t]) for t in tokens)
        rewards.append(float(batch["rewards_B"][response]) - 0.5 * gap)
        positions += length
    groups = [[0, 1, 2], [3, 5]]
    means = {response: sum(rewards[r] for r in group) / len(group) for group in groups for response in group}
    return [rewards[r] - means[r] if r in means else 0.0 for r in range(6)]


def parts_of(batch: Batch, replica: int, replicas: int) -> list[Minibatch]:
    """Return a replica's parts of two mini-batches, each with responses of both groups."""
    parts = []
    for chosen in ([0, 3, 4], [1, 2, 5]):
        whole = batch.select(chosen)
        plan = MinibatchPlan(
            whole.outline(), pack(whole.lengths_B, RowRules(8, count_multiple=replicas)), replica, replicas
        )
        parts.append(plan.minibatch(whole.select(plan.owned())))
    return parts


def test_advantages_are_those_of_the_penalized_rewards():
    batch = step_batch()
    found = penalize_rewards(parts_of(batch, 0, 1), KL, "dr", lambda values: values)
    expected = by_hand(batch)
    assert found[0]["advantages_B"].tolist() == pytest.approx([expected[r] for r in (0, 3, 4)], abs=1e-14)
    assert found[1]["advantages_B"].tolist() == pytest.approx([expected[r] for r in (1, 2, 5)], abs=1e-14)
    assert expected[4] == 0
    assert len(set(expected)) == 6


def test_replicas_find_the_advantages_of_one():
    """Each replica adds its sums; the other's are recorded in a first pass."""
    batch = step_batch()
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])

    def recorder(replica: int) -> Callable[[Tensor], Tensor]:
        def record(values: Tensor) -> Tensor:
            sums[replica].append(values)
            return values

        return record

    for replica in range(2):
        penalize_rewards(parts_of(batch, replica, 2), KL, "dr", recorder(replica))
    expected, seen = by_hand(batch), 0
    for replica in range(2):
        totals = iter([a + b for a, b in zip(*sums, strict=True)])
        parts = penalize_rewards(parts_of(batch, replica, 2), KL, "dr", lambda values, totals=totals: next(totals))
        for chosen, part in zip(([0, 3, 4], [1, 2, 5]), parts, strict=True):
            wanted = [expected[chosen[index]] for index in part.owned_B.tolist()]
            assert part["advantages_B"].tolist() == pytest.approx(wanted, abs=1e-14)
            seen += len(part)
    assert seen == 6


def test_the_loss_has_no_penalty_that_is_in_the_reward():
    batch = step_batch()
    batch = batch.add({"advantages_B": torch.ones(6, dtype=torch.float64)})
    inputs = LossInputs.gather(batch.add(prepare(batch, GRPO())))

    def loss(kl: ReferenceKL) -> float:
        return make_loss(GRPO(), kl)(
            inputs.old_logprobs_R + 0.1, torch.zeros(len(batch.trained_R)), inputs
        ).value.item()

    assert loss(KL) == loss(ReferenceKL())
    assert loss(KL.model_copy(update={"placement": "loss"})) != loss(KL)


def test_settings_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="which placement"):
        ReferenceKL(coefficient=0.1, unbiased=True, placement="reward")
    words = ["model.path=x", "kl.coefficient=0.1", "kl.placement=reward", "advantage.kind=gdpo", "reward.format=think"]
    with pytest.raises(ConfigError, match='has several; write "loss"'):
        load(Run, [], words)
