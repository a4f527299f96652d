"""Fields of megatron-core's configuration: recomputed modules, Muon, and what a machine without a GPU refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.process_groups import destroy_mesh
from megatron_rl.policy.upstream import RELEASE
from tests.policy import families
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of
from tests.ranks import RankError, run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


def gradients(folder: str, modules: list[list[str]], parallel: dict[str, object]) -> list[dict[str, Tensor]]:
    """Return log-probs and gradients of one step with each list of recomputed modules; an empty list: nothing."""
    world = start_world(60, deterministic=True)
    found: list[dict[str, Tensor]] = []
    for names in modules:
        model = {"recompute": "selective", "megatron": {"recompute_modules": names}} if names else {}
        policy = Policy(run_of(Path(folder), parallel=parallel, model=model), world, total_updates=1)
        batch = policy.local_part(case())
        scored = policy.compute_logprobs(batch)
        policy.forward_backward(batch, weighted, whole_gradients=True)
        found.append({name: tensor.clone() for name, tensor in policy.gradients()} | {"logprobs": scored.logprobs_T})
        destroy_mesh()
    return found


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "expert": 2}], ids=["one rank", "tensor and expert"])
def test_recomputed_modules_change_no_gradient(tmp_path: Path, parallel: dict[str, object]) -> None:
    folder = families.save("deepseek_v3", tmp_path / "hf")
    lists: list[list[str]] = [
        [],
        *([module] for module in MODULES),
        ["core_attn", "layernorm", "mla_up_proj", "mlp", "moe"],
    ]
    (plain, *others) = run_ranks(gradients, 2 if parallel else 1, str(folder), lists, parallel, initialize=False)[0]
    for names, found in zip(lists[1:], others, strict=True):
        assert torch.equal(found["logprobs"], plain["logprobs"])
        largest = max(float(tensor.abs().max()) for name, tensor in plain.items() if name != "logprobs")
        for name, tensor in plain.items():  # recomputed norms add gradients in another order: 4e-7 was measured
            torch.testing.assert_close(found[name], tensor, atol=5e-6 * largest, rtol=0, msg=f"{names} {name}")


def updated(
    folder: str, parallel: dict[str, object], fields: dict[str, object], dtype: str = "float32"
) -> dict[str, Tensor]:
    """Return the weights after two updates."""
    parallel = {"distributed_optimizer": "optimizer" not in fields, **parallel}
    optimizer = {"lr": 0.02, "megatron": fields}
    run = run_of(Path(folder), parallel=parallel, optimizer=optimizer, model={"dtype": dtype})
    policy = Policy(run, start_world(60, deterministic=True), total_updates=2)
    for _ in range(2):
        policy.forward_backward(policy.local_part(case()), weighted)
        policy.optim_step()
    return {name: tensor.clone() for name, tensor in policy.weights(1 << 16)}


OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}


@pytest.mark.skipif(RELEASE < (0, 19), reason="Muon needs megatron-core 0.19")
def test_muon_updates_do_not_depend_on_the_layout(model: Path) -> None:
    pytest.importorskip("emerging_optimizers", reason="Muon needs the package emerging-optimizers")
    muon: dict[str, object] = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest"}

    def after(parallel: dict[str, object], fields: dict[str, object], ranks: int) -> dict[str, Tensor]:
        return run_ranks(updated, ranks, str(model), parallel, fields, initialize=False)[0]

    def apart(weights: dict[str, Tensor]) -> float:
        # Adam updates the others; its first updates are signs, also those of a rounding error.
        matrices = [name for name, tensor in alone.items() if tensor.dim() == 2 and "layers" in name]
        return max(float((weights[name] - alone[name]).abs().max()) for name in matrices)

    alone = after({}, muon, 1)
    # Newton-Schulz amplifies rounding of small singular values; an update moves weights by about lr = 0.02.
    assert apart(after({"tensor": 2}, muon, 2)) < 1e-4
    assert apart(after({"tensor": 2, "expert": 2}, muon, 2)) < 1e-4
    assert apart(after({"tensor": 2}, {**muon, "muon_tp_mode": "blockwise"}, 2)) > 1e-3
    assert apart(after({}, {}, 1)) > 1e-3


@pytest.mark.parametrize(
    ("fields", "dtype", "error"),
    [
        (OFFLOAD, "bfloat16", "KeyError"),
        (OFFLOAD, "float32", "can't optimize a non-leaf Tensor"),
        (
            {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"},
            "bfloat16",
            "requires FusedAdam|in is_te_min_version",
        ),
    ],
    ids=["offload", "offload of float32", "precision"],
)
def test_what_needs_a_gpu_raises_without_one(model: Path, fields: dict[str, object], dtype: str, error: str) -> None:
    """``check`` refuses these settings on a machine without a GPU, or in float32; it names these errors."""
    with pytest.raises(RankError, match=error):
        run_ranks(updated, 1, str(model), {}, fields, dtype, initialize=False)
