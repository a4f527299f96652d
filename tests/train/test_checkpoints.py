"""Checkpoints of a real policy: bit for bit on the layout that wrote them, the same numbers on any other."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.data.pack import pack
from megatron_rl.parallel.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.names import family_of, read_hf_config
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.resume import checkpoint_name, open_pieces, read_meta
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of, save_model
from tests.ranks import run_ranks

LR = 1e-3
Sections = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Layout:
    """Ranks, sizes of the axes, and other sections of the configuration."""

    ranks: int
    parallel: Mapping[str, object] = field(default_factory=dict)
    sections: Sections = field(default_factory=dict)


def plain(ranks: int, **parallel: object) -> Layout:
    return Layout(ranks, {"distributed_optimizer": False, **parallel})


def bfloat16(ranks: int, **parallel: object) -> Layout:
    return Layout(ranks, parallel, {"model": {"dtype": "bfloat16"}})


LAYOUTS = {
    "one": Layout(1),
    "data2": Layout(2),
    "data4": Layout(4),
    "tensor2": Layout(2, {"tensor": 2}),  # experts cut over tensor ranks too
    "pipeline2": Layout(2, {"pipeline": 2}),
    "interleaved": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context2": Layout(2, {"context": 2}),
    "expert2": Layout(2, {"expert": 2}),
    "expert4": Layout(4, {"expert": 4}),
    "tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2}),
    "tensor2 pipeline2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "tensor2 expert2 data2": Layout(4, {"tensor": 2, "expert": 2}),
    "pipeline2 expert2": Layout(4, {"pipeline": 2, "expert": 2}),
    "tensor2 context2 expert4": Layout(4, {"tensor": 2, "context": 2, "expert": 4}),
    "plain": plain(1),
    "plain data2": plain(2),
    "plain tensor2": plain(2, tensor=2),
    "plain tensor2 pipeline2": plain(4, tensor=2, pipeline=2),
    "bfloat16": bfloat16(1),
    "bfloat16 data2": bfloat16(2),
    "bfloat16 tensor2 expert2": bfloat16(2, tensor=2, expert=2),
    "bfloat16 plain tensor2": bfloat16(2, tensor=2, distributed_optimizer=False),
    "dropout": Layout(2, {"tensor": 2}, {"model": {"megatron": {"hidden_dropout": 0.2}}}),
}
STRAIGHT = (2, 3, 4)


def work(model: str, folder: str, layout: Layout, saves: tuple[int, ...], resume: bool) -> dict[str, Tensor]:
    """Train on this rank up to each of ``saves``, writing a checkpoint there; a save at once writes what was loaded."""
    sections: dict[str, Mapping[str, object]] = {"parallel": layout.parallel, **layout.sections}
    optimizer = {"lr": LR, "warmup_steps": 3, "weight_decay": 0.1}
    checkpoint = {"keep": 100}
    run = run_of(Path(model), optimizer=optimizer, log={"path": folder}, checkpoint=checkpoint, **sections)
    world = start_world(60, deterministic=True)
    torch.manual_seed(world.rank)
    policy = Policy(run, world, total_updates=8)
    checkpoints = Checkpoints(run, world, policy)
    if resume:
        assert checkpoints.load() == (policy.updates, {"next_prompt": 7})
    rows = pack(case(), policy.row_rules)
    norms = []
    for save in saves:
        while policy.updates < save:
            policy.accumulate(rows, weighted)
            norms.append(policy.step().grad_norm)
        checkpoints.save(save if policy.updates == save else AGAIN, {"next_prompt": 7})
    checkpoints.finish()
    logprobs_T = policy.score(rows)["old_logprobs_T"]
    dist.barrier()
    return {"logprobs_T": logprobs_T, "norms": torch.tensor(norms)}


AGAIN = 1
"""Under this step a loaded state is written once more, by whatever layout loaded it."""


def contents(folder: Path, model: Path, step: int) -> dict[str, Tensor]:
    """Return everything in a checkpoint under Hugging Face names, whoever wrote it."""
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    reader = open_pieces(checkpoint, read_meta(checkpoint))
    state: dict[str, Tensor] = {}
    for name, layer, expert in family_of(read_hf_config(model)).parameters():
        for kind in ("model", "main", "exp_avg", "exp_avg_sq"):
            tensor = f"{kind}/{name.full(layer, expert)}"
            if tensor in reader:
                parts = reader.merged(tensor, name.layout)
                state |= {f"{kind} {n}": p for n, p in zip(name.hf_names(layer, expert), parts, strict=True)}
    return state


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep torch from starting threads in this process: forked ranks would not have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """A function: layout -> (run folder, result) of four updates that nothing interrupted, saved on the way."""

    @cache
    def run(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("straight")
        layout = LAYOUTS[name]
        return folder, run_ranks(
            work, layout.ranks, str(model), str(folder), layout, STRAIGHT, False, initialise=False
        )[0]

    return run


def resumed(straight: Path, folder: Path, step: int) -> Path:
    """Return a run folder that ends with this checkpoint of another run."""
    name = checkpoint_name(step)
    shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_and_two_updates_are_four_bit_for_bit(straight, model, tmp_path, name):
    whole, expected = straight(name)
    folder = resumed(whole, tmp_path, 2)

    result = run_ranks(
        work, LAYOUTS[name].ranks, str(model), str(folder), LAYOUTS[name], (3, 4), True, initialise=False
    )

    for step in (3, 4):
        same(contents(folder, model, step), contents(whole, model, step))
        for file in (whole / "checkpoints" / checkpoint_name(step)).glob("*.safetensors"):
            assert file.read_bytes() == (folder / file.relative_to(whole)).read_bytes()
    assert torch.equal(result[0]["logprobs_T"], expected["logprobs_T"])
