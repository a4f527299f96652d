"""The entropy bonus: its gradient through the vocabulary, and the controller of its coefficient."""

import pytest
import torch
from pydantic import ValidationError

import megatron_rl
from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.objectives import R2VPO
from megatron_rl.algorithms.state import LossState
from megatron_rl.data.types import Metrics
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.ops.head import head_logprobs_entropies


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden_BSH = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    ids_BS = torch.randint(0, 11, (2, 3), generator=generator)
    mask_BS = torch.tensor([[True, True, False], [True, False, False]])
    return hidden_BSH, weight_VH, ids_BS, mask_BS


def test_the_gradient_is_that_of_the_entropy_itself():
    """Against autograd through a softmax over the whole vocabulary, with the weights 1 / (B N_i)."""
    hidden_BSH, weight_VH, ids_BS, mask_BS = problem()
    weight_VH.requires_grad_()
    logprobs, entropies = head_logprobs_entropies(hidden_BSH.flatten(0, 1), weight_VH, ids_BS.flatten())
    old = logprobs.detach().view(2, 3)
    result = megatron_rl.policy_loss(
        {"name": "grpo", "entropy": {"coefficient": 0.3}},
        logprobs=logprobs.view(2, 3),
        old_logprobs=old,
        advantages=torch.tensor([1.0, -0.5]),
        loss_mask=mask_BS,
        current_entropies=entropies.view(2, 3),
    )
    (gradient,) = torch.autograd.grad(result.loss, weight_VH)

    table_BSV = torch.log_softmax(hidden_BSH @ weight_VH.T, dim=-1)
    chosen_BS = table_BSV.gather(-1, ids_BS[..., None]).squeeze(-1)
    entropies_BS = -(table_BSV.exp() * table_BSV).sum(-1)
    weights_BS = mask_BS / (2 * mask_BS.sum(1, keepdim=True))
    ratio_BS = (chosen_BS - old).exp()
    loss = -(weights_BS * (torch.tensor([[1.0], [-0.5]]) * ratio_BS + 0.3 * entropies_BS)).sum()
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, weight_VH)[0], rtol=0, atol=1e-14)
    assert result.metrics["entropy_mean"] == pytest.approx(entropies_BS[mask_BS].mean().item(), abs=1e-14)
    assert result.metrics["entropy_coefficient"] == pytest.approx(0.3, abs=1e-15)
    assert result.state == {}


def test_a_bonus_without_current_entropies_is_an_error():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="pass current_entropies"):
        megatron_rl.policy_loss(
            {"name": "grpo", "entropy": {"target": 0.2}},
            logprobs=zeros,
            old_logprobs=zeros,
            advantages=torch.ones(1),
            loss_mask=torch.ones(1, 2, dtype=torch.bool),
        )


def metrics(entropy: float, tokens: int = 4) -> Metrics:
    sums = {"loss": 0.0, "tokens": tokens, "responses": 1, "segments": 1, "ratio": tokens, "clipped": 0}
    sums |= {"entropy": entropy * tokens, "policy_kl": 0.0}
    return Metrics({name: torch.tensor(float(value), dtype=torch.float64) for name, value in sums.items()})


def coefficients(bonus: EntropyBonus, entropies: list[float]) -> list[float]:
    state = LossState(bonus)
    found = []
    for entropy in entropies:
        state.advance(metrics(entropy))
        found.append(state.values["entropy_coefficient"])
    return found


def test_the_coefficient_rises_at_most_at_the_target_and_falls_above_it():
    bonus = EntropyBonus(coefficient=0.005, target=0.2, step=0.005, max_coefficient=0.012)
    expected = [0.01, 0.012, 0.012, 0.007, 0.002, 0.0, 0.005]
    found = coefficients(bonus, [0.2, 0.1, 0.1, 0.3, 0.3, 0.3, 0.2])
    assert found == pytest.approx(expected, abs=1e-15)


def test_a_target_of_the_initial_entropy_keeps_the_first_update_as_its_reference():
    bonus = EntropyBonus(target_fraction=0.5)
    assert coefficients(bonus, [0.8, 0.41, 0.4, 0.5]) == pytest.approx([0.0, 0.0, 0.005, 0.0], abs=1e-15)


def test_an_update_without_tokens_changes_nothing():
    state = LossState(EntropyBonus(coefficient=0.01, target=1.0), R2VPO())
    before = dict(state.values)
    state.advance(metrics(0.0, tokens=0))
    assert state.values == before


def test_a_restored_state_continues_bit_for_bit():
    bonus = EntropyBonus(target_fraction=0.9, step=0.0017)
    whole, first = LossState(bonus), LossState(bonus)
    for entropy in (0.71, 0.5):
        whole.advance(metrics(entropy))
        first.advance(metrics(entropy))
    second = LossState(bonus)
    second.restore(first.values)
    for entropy in (0.64, 0.63, 0.9):
        whole.advance(metrics(entropy))
        second.advance(metrics(entropy))
    assert second.values == whole.values
    with pytest.raises(DataError, match="is not a number"):
        second.restore({"entropy_coefficient": "0.1"})


def test_two_targets_or_too_large_a_start_are_refused():
    with pytest.raises(ValidationError, match="keep one of the two targets"):
        EntropyBonus(target=0.2, target_fraction=0.5)
    with pytest.raises(ValidationError, match="exceeds max_coefficient"):
        EntropyBonus(target=0.2, coefficient=0.5)
