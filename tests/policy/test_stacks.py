"""The tensor that a layer's experts make, from ranks that each have a part of some of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.policy import families
from tests.policy.tiny import run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]


def exported(folder: str, parallel: dict[str, object], own: bool) -> dict[str, Tensor]:
    """Return what this rank hands out."""
    policy = Policy(run_of(Path(folder), parallel=parallel), start_world(60, deterministic=True), total_updates=1)
    weights = policy.weights(1 << 16)
    return {name: tensor.clone() for name, tensor in (weights.owned_tensors() if own else weights)}


@pytest.mark.parametrize("own", [False, True], ids=["to the main rank", "each its own"])
@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2, "expert": 2, "expert_tensor": 2}, {"pipeline": 2, "expert": 2}, {"expert": 2, "ranks": 4}],
    ids=["parts of some", "stages", "copies"],
)
def test_every_expert_has_its_place_in_the_stack(tmp_path: Path, parallel: dict[str, object], own: bool) -> None:
    """``parts of some`` is a layout that cannot be trained on gloo; its weights can be loaded and handed out."""
    folder = families.save("gpt_oss", tmp_path / "hf")

    ranks = run_ranks(exported, 4, str(folder), parallel, own, initialize=False, timeout_seconds=200)

    on_disk = load_file(folder / "model.safetensors")
    assert sorted(name for found in ranks for name in found) == sorted(on_disk)  # each once
    assert all(torch.equal(tensor, on_disk[name]) for found in ranks for name, tensor in found.items())
    assert own or not any(ranks[1:])
