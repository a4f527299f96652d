"""The numbers that a loss adapts, on several ranks in float64."""

from pathlib import Path

import pytest

from megatron_rl.algorithms.entropy import EntropyBonus
from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.algorithms.objectives import BAPO, R2VPO
from megatron_rl.algorithms.objectives.base import Objective
from megatron_rl.algorithms.state import LossState
from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.prove.case import make_batch, perturbed_logprobs
from tests.policy.tiny import VOCABULARY, run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
}
UPDATES = 3

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
    for layout, (ranks, parallel) in LAYOUTS.items():
        found = run_ranks(adapt, ranks, str(model), parallel, objective, batch, initialize=False)
        assert found[0] == found[1], layout  # bit for bit
        # Sums in another order, in float64, over three updates of the weights.
        for ours, expected in zip([*found[0][0], *found[0][1]], [*states, *measured], strict=True):
            assert ours == pytest.approx(expected, rel=1e-9), layout
    assert len({tuple(numbers.values()) for numbers in states}) == UPDATES
    assert len({tuple(numbers.values()) for numbers in measured}) > 1
