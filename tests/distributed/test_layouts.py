"""Loss and gradient do not depend on the layout, for every objective: a fast subset of ``megatron-rl prove``."""

from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.prove.layouts import DEFAULT
from megatron_rl.prove.main import prove

pytestmark = pytest.mark.processes

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
FAST = (
    "packing=false,recompute=full",
    "tokens=64",
    "tensor=2,expert=2,tokens=128",
    "pipeline=2,virtual_pipeline=2,tokens=128",
    "context=2,tokens=128",
    "data=2,tokens=64",
    "tensor=2,expert_tensor=2,recompute=full",
    "tensor=2,expert_tensor=1",
    "pipeline=2,expert=2,tokens=128",
)


@pytest.mark.timeout(1200)
def test_fast_layouts_give_the_gradient_of_one_rank_for_every_objective(tmp_path: Path) -> None:
    # The entropy bonus adds a gradient through the whole vocabulary to that of each objective.
    loaded = load(Run, [str(DEMO)], ["entropy.coefficient=0.02"])

    assert prove(loaded, FAST, shrink="layers=4,hidden=48", objectives=["all"], output=tmp_path / "prove.json") == 0


@pytest.mark.timeout(1200)
def test_the_load_balancing_loss_has_the_same_gradient_in_every_layout(tmp_path: Path) -> None:
    aux = "model.megatron={moe_router_load_balancing_type = 'aux_loss', moe_aux_loss_coeff = 0.1}"
    loaded = load(Run, [str(DEMO)], [aux])
    # One sequence per row: the loss of a row is not a sum over tokens, so all layouts must have equal rows.
    axes = ("tensor=2,expert=2", "context=2", "pipeline=2", "data=2")
    layouts = [f"{axis},packing=false" for axis in axes]

    assert prove(loaded, layouts, shrink="layers=2,hidden=48", objectives=["grpo"], output=tmp_path / "p.json") == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_default_set_passes(tmp_path: Path, dtype: str) -> None:
    plain = ["parallel.distributed_optimizer=false", "optimizer.clip_grad=0"] if dtype == "float64" else []
    loaded = load(Run, [str(DEMO)], [f"model.dtype={dtype}", *plain])

    assert prove(loaded, DEFAULT, shrink="layers=4,hidden=48", objectives=["all"], output=tmp_path / "prove.json") == 0
