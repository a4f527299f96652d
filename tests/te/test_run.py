"""Log-probs and gradients of every family on transformer-engine's layers against transformers in float64, on a CPU.

Kernels are the stand-ins of ``doubles``; the layers, their wrappers and everything around them are the real ones.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy import families
from tests.policy.test_families import by_transformers
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of
from tests.ranks import run_ranks
from tests.te.layouts import CASES, parallel_of

pytestmark = [pytest.mark.te, pytest.mark.processes, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def truth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Return a function from a family's name to its checkpoint folder and the results of transformers."""
    found: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def truth(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in found:
            folder = families.save(name, tmp_path_factory.mktemp(name))
            found[name] = folder, by_transformers(folder, case())
        return found[name]

    return truth


def one_step(folder: str, parallel: dict[str, object], batch: Batch) -> dict[str, Tensor]:
    """Return the main rank's log-probs, gradients and weights; nothing on other ranks."""
    from tests.te import doubles  # imports transformer-engine's wrappers, which other environments lack

    doubles.install()
    run = run_of(Path(folder), parallel=parallel, train={"tokens_per_microbatch": 2048})
    policy = Policy(run, start_world(60, deterministic=True), total_updates=1)
    part = policy.local_part(batch)
    results = whole(policy, part, {"logprobs_T": policy.compute_logprobs(part).logprobs_T})
    results |= {f"weight.{name}": tensor.clone() for name, tensor in policy.weights(1 << 16)}
    policy.forward_backward(part, weighted, whole_gradients=True)
    results |= {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    dist.barrier()
    return results if dist.get_rank() == 0 else {}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_family_agrees_with_transformers(truth_of, monkeypatch, record_property, name: str, layout: str) -> None:
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")  # after the stand-ins, torch reports a CUDA device
    folder, truth = truth_of(name)
    ranks, parallel = parallel_of(name, layout)

    ours = run_ranks(one_step, ranks, str(folder), parallel, case(), initialize=False, timeout_seconds=280)[0]

    gradients = {key for key in truth if key.startswith("gradient.")}
    assert gradients == {key for key in ours if key.startswith("gradient.")}
    largest = max(float(truth[key].abs().max()) for key in gradients)
    errors = {key: float((ours[key].double() - truth[key]).abs().max()) / largest for key in gradients}
    worst = max(errors, key=lambda key: errors[key])
    logprob = float((ours["logprobs_T"].double() - truth["logprobs_T"]).abs().max())
    record_property("logprob_error", logprob)
    record_property("gradient_error", errors[worst])
    print(f"{name}, {layout}: log-prob {logprob:.1e}, gradient {errors[worst]:.1e} of the largest ({worst})")

    # float32 against float64 over four layers.
    assert logprob < 1e-5
    assert errors[worst] < 5e-6, worst
    on_disk = load_file(folder / "model.safetensors")
    assert {key.removeprefix("weight.") for key in ours if key.startswith("weight.")} == on_disk.keys()
    assert all(torch.equal(ours[f"weight.{key}"], tensor) for key, tensor in on_disk.items())
