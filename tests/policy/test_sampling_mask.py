"""Log-probs, entropies and gradients of a policy restricted to the ids that the engine sampled from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy.test_parity import weighted
from tests.policy.test_replay import agree
from tests.policy.tiny import VOCABULARY, by_transformers, case, run_of, save_model
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tensor and expert": (2, {"tensor": 2, "expert": 2}),
    "context": (2, {"context": 2}),
    "pipeline": (2, {"pipeline": 2}),
}


def given() -> Batch:
    """Return the case with up to five ids per token; some tokens have none and are not restricted."""
    batch, generator = case(), torch.Generator().manual_seed(11)
    ids_T = batch["input_ids_T"]
    others_TQ = torch.rand(len(ids_T), VOCABULARY, generator=generator).topk(4).indices
    kept_TQ = torch.cat((ids_T[:, None], others_TQ), dim=1).to(torch.int32)
    kept_TQ[torch.rand(kept_TQ.shape, generator=generator) < 0.3] = -1
    kept_TQ[torch.rand(len(ids_T), generator=generator) < 0.2] = -1
    return batch.add({"mask_ids_T": kept_TQ})


def one_step(folder: str, parallel: dict[str, object]) -> dict[str, Tensor] | None:
    world = start_world(60, deterministic=True)
    policy = Policy(run_of(Path(folder), parallel=parallel), world, total_updates=1)
    batch = policy.local_part(given())
    scored = policy.compute_logprobs(batch).as_old()
    policy.forward_backward(batch.add(scored), weighted, whole_gradients=True)
    gradients = {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    scored = whole(policy, batch, scored)
    return {**scored, **gradients} if world.is_main else None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model: Path) -> dict[str, Tensor]:
    return by_transformers(model, given())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_policy_agrees_with_transformers_under_any_layout(
    model: Path, truth: dict[str, Tensor], layout: str
) -> None:
    ranks, parallel = LAYOUTS[layout]
    ours = run_ranks(one_step, ranks, str(model), parallel, initialize=False, timeout_seconds=280)[0]

    assert ours is not None
    agree(ours, {**truth, "old_logprobs_T": truth["logprobs_T"]})
    torch.testing.assert_close(ours["old_entropies_T"].double(), truth["entropies_T"], atol=1e-5, rtol=0)
