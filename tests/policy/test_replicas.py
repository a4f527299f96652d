"""Data-parallel replicas hold the tokens of their own responses only, and together compute what one rank computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.algorithms.objectives import SSPO
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.distributed.collectives import broadcast_tensors
from megatron_rl.distributed.mesh import start_world
from megatron_rl.distributed.replicas import CPU
from megatron_rl.policy.engine import Policy
from megatron_rl.rollout.distribution import TokenDistribution, columns_of, schema_of
from tests.policy.test_replay import given
from tests.policy.tiny import VOCABULARY, run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.processes]

WORDS = Vocabulary(VOCABULARY, tuple(b"." if token % 4 == 0 else b"a" for token in range(VOCABULARY)))
UPDATES = 2
LAYOUTS: dict[str, tuple[int, int, dict[str, object]]] = {
    "two replicas": (2, 2, {}),
    "four replicas": (4, 4, {}),
    "two of tensor ranks": (4, 2, {"tensor": 2}),
    "two of pipeline stages": (4, 2, {"pipeline": 2}),
}
"""Name -> ranks, data-parallel replicas, parallel sizes."""


def step_batch() -> Batch:
    """Return the batch of a step as the main rank has it: some samples of the step were dropped from it."""
    batch = given()
    noise = batch["noise_T"].float()
    return batch.add({"sample_index_B": 3 + 2 * torch.arange(len(batch)), "rollout_logprobs_T": noise - 2})


def one_step(folder: str, parallel: dict[str, object]) -> tuple[int, int, int, dict[str, Tensor]]:
    """Return bytes and tokens of this rank's columns, the layers whose routes it has, and on the main rank results."""
    run = run_of(Path(folder), parallel=parallel, rollout={"routing_replay": "r3"})
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=UPDATES)
    batch = step_batch() if world.is_main else None  # no other rank ever has the whole step
    sent = None if batch is None else {"lengths_B": batch.lengths_B, **batch.outline().columns}
    columns = broadcast_tensors(sent, 0, CPU)
    assert columns is not None
    assert not [name for name in columns if name.endswith("_T")]
    outline = Batch(columns.pop("lengths_B"), columns)
    plans = [policy.plan(part) for part in outline.split(UPDATES, seed=(0, 1))]
    distribution = TokenDistribution(policy.mesh, policy.route_layers)
    read = None if batch is None else columns_of(batch)
    minibatches = distribution.fetch(plans, read, None if batch is None else schema_of(batch.columns))

    tokens = sum(int(minibatch.lengths_B.sum()) for minibatch in minibatches)
    held = [column for minibatch in minibatches for name, column in minibatch.columns.items() if name.endswith("_T")]
    bytes_held = sum(column.untyped_storage().nbytes() for column in held)
    results: dict[str, Tensor] = {}
    for number, minibatch in enumerate(minibatches):
        scored = minibatch.add(policy.compute_logprobs(minibatch).as_old())
        scored = scored.add({"old_logprobs_T": scored["old_logprobs_T"] + scored["noise_T"].float()})
        prepared = scored.add(prepare(scored, SSPO(), None, WORDS, total=policy.total))
        metrics = policy.forward_backward(prepared, make_loss(SSPO()), whole_gradients=True)
        results |= {f"{number}/{name}": value for name, value in metrics.sums.items()}
        results |= {f"{number}/gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    return bytes_held, tokens, len(policy.route_layers), results if world.is_main else {}


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Tensor]:
    return run_ranks(one_step, 1, str(model), {}, initialize=False)[0][3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_its_own_tokens_and_all_together_compute_the_step(model, alone, layout: str) -> None:
    ranks, replicas, parallel = LAYOUTS[layout]
    batch = step_batch()
    total = int(batch.lengths_B.sum())
    columns = {name: column for name, column in batch.columns.items() if name.endswith("_T")}
    per_token = sum(c[0].numel() * c.element_size() for name, c in columns.items() if name != "rollout_routes_T")

    found = run_ranks(one_step, ranks, str(model), parallel, initialize=False, timeout_seconds=280)

    assert sum(tokens for _, tokens, _, _ in found) * replicas == total * ranks
    assert max(tokens for _, tokens, _, _ in found) < 1.35 * total / replicas  # 24 responses of up to 40 tokens
    for bytes_held, tokens, layers, _ in found:
        assert bytes_held == tokens * (per_token + layers * batch["rollout_routes_T"].shape[2])
    results = found[0][3]
    assert results.keys() == alone.keys()
    for name, expected in alone.items():
        # float32 sums in another order, as in test_parity; counts are exact.
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(results[name].double(), expected.double(), atol=2e-5 * scale, rtol=0, msg=name)
        if name.partition("/")[2] in ("tokens", "trained"):
            assert torch.equal(results[name], expected)
