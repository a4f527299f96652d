"""The numbers that a loss adapts, and the gradient of the entropy bonus, on several ranks in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import BAPO, GRPO, R2VPO
from megatron_rl.algorithms.objectives.base import Objective
from megatron_rl.algorithms.state import LossState
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.prove.case import make_batch, perturbed_logprobs
from tests.policy.tiny import VOCABULARY, by_transformers, run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "context": (2, {"context": 2}),
    "expert": (2, {"expert": 2}),
    "data": (2, {}),
}
UPDATES = 3
COEFFICIENT = 0.3

Numbers = list[dict[str, float]]


def run_in_float64(folder: str, parallel: dict[str, object]) -> Run:
    return run_of(
        Path(folder),
        parallel={**parallel, "distributed_optimizer": False},
        model={"dtype": "float64"},
        optimizer={"lr": 1e-3, "clip_grad": 0},
    )


def adapt(folder: str, parallel: dict[str, object], objective: Objective, batch: Batch) -> tuple[Numbers, Numbers]:
    """Train a few updates on this rank; return the state and the objective's metrics after each."""
    bonus = EntropyBonus(coefficient=0.01, target_fraction=1.0)
    run = run_in_float64(folder, parallel)
    policy = Policy(run, start_world(60, deterministic=True), total_updates=UPDATES)
    state = LossState(objective, bonus)
    part = policy.local_part(batch)
    part = part.add(perturbed_logprobs(part, policy.compute_logprobs(part).as_old()))
    states: Numbers = []
    measured: Numbers = []
    for _ in range(UPDATES):
        part = part.add(policy.compute_logprobs(part).as_current())
        columns = prepare(part, objective, total=policy.total, entropy=bonus, state=state.values)
        metrics = policy.forward_backward(part.add(columns), make_loss(objective))
        policy.optim_step()
        state.advance(metrics)
        states.append(dict(state.values))
        measured.append({name: value for name, value in summary(metrics).items() if name.startswith("objective/")})
    return states, measured


@pytest.mark.parametrize("objective", [R2VPO(eta=1.0), BAPO(positive_share=0.9)], ids=lambda each: each.name)
def test_adapted_numbers_are_equal_on_all_ranks_and_those_of_one_rank(model: Path, objective: Objective) -> None:
    batch = make_batch(VOCABULARY, seed=3)
    ((states, measured),) = run_ranks(adapt, 1, str(model), {}, objective, batch, initialize=False)
    for layout in ("data", "tensor", "pipeline"):
        ranks, parallel = LAYOUTS[layout]
        found = run_ranks(adapt, ranks, str(model), parallel, objective, batch, initialize=False)
        assert found[0] == found[1], layout  # bit for bit
        # Sums in another order, in float64, over three updates of the weights.
        for ours, expected in zip([*found[0][0], *found[0][1]], [*states, *measured], strict=True):
            assert ours == pytest.approx(expected, rel=1e-9), layout
    assert len({tuple(numbers.values()) for numbers in states}) == UPDATES
    assert len({tuple(numbers.values()) for numbers in measured}) > 1


def entropy_gradient(folder: str, parallel: dict[str, object], batch: Batch) -> dict[str, Tensor] | None:
    """Return the gradients of the entropy bonus alone on the main rank: advantages are 0."""
    world = start_world(60, deterministic=True)
    policy = Policy(run_in_float64(folder, parallel), world, total_updates=1)
    part = policy.local_part(batch)
    part = part.add(policy.compute_logprobs(part).as_old())
    columns = prepare(part, GRPO(), total=policy.total, entropy=EntropyBonus(coefficient=COEFFICIENT))
    policy.forward_backward(part.add(columns), make_loss(GRPO()), whole_gradients=True)
    gradients = {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    return gradients if world.is_main else None


@pytest.fixture(scope="module")
def by_one_rank(model: Path) -> dict[str, Tensor]:
    """The gradients of one rank."""
    batch = without_advantages()
    (gradients,) = run_ranks(entropy_gradient, 1, str(model), {}, batch, initialize=False)
    assert gradients is not None
    return gradients


def without_advantages() -> Batch:
    batch = make_batch(VOCABULARY, seed=3)
    return batch.add({"advantages_B": torch.zeros(len(batch), dtype=torch.float64)})


def assert_close_to(ours: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Compare all gradients, with a tolerance that is a share of the largest of their elements."""
    gradients = {name for name in expected if name.startswith("gradient.")}
    assert gradients == ours.keys()
    largest = max(float(expected[name].abs().max()) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(ours[name].double(), expected[name].double(), atol=share * largest, rtol=0, msg=name)


def test_the_gradient_of_the_entropy_bonus_is_that_of_autograd(model: Path, by_one_rank: dict[str, Tensor]) -> None:
    """Through transformers' model in float64, one sequence at a time."""
    batch = make_batch(VOCABULARY, seed=3)
    counts_B = batch.trainable_counts_B
    shares_B = 1 / (counts_B.clamp(min=1).double() * (counts_B > 0).sum())
    weights_T = torch.repeat_interleave(shares_B, batch.lengths_B)
    columns = {"weights_T": torch.zeros_like(weights_T), "extra_entropy_weights_T": -COEFFICIENT * weights_T}
    # Norms and routers of transformers compute in float32: 5e-6 of the largest one.
    assert_close_to(by_one_rank, by_transformers(model, batch.add(columns)), 5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_entropy_bonus_is_the_same_in_every_layout(
    model: Path, by_one_rank: dict[str, Tensor], layout: str
) -> None:
    ranks, parallel = LAYOUTS[layout]
    ours = run_ranks(entropy_gradient, ranks, str(model), parallel, without_advantages(), initialize=False)[0]
    assert ours is not None
    # Sums in another order, where parts of the model compute in float32: 1e-6 of the largest one.
    assert_close_to(ours, by_one_rank, 1e-6)
