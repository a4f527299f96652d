"""Checkpoints of a real policy: bit for bit on the layout that wrote them, the same numbers on any other."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.distributed.mesh import start_world
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.training_checkpoint import open_sharded_state, read_meta
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.upstream import RELEASE
from megatron_rl.train.checkpoints import Checkpoints
from megatron_rl.train.resume import checkpoint_name
from tests.minibatches import whole
from tests.policy import families
from tests.policy.pretend_gpu import pretend_offload
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of, save_model
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Layout:
    """Ranks, axis sizes, precision, model, megatron-core fields of model and optimizer, and the reference policy."""

    ranks: int
    parallel: Mapping[str, object] = field(default_factory=dict)
    dtype: str = "float32"
    model: str = "untied"
    megatron: Mapping[str, object] = field(default_factory=dict)
    optimizer: Mapping[str, object] = field(default_factory=dict)
    kl: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_special(self) -> bool:
        """Whether its checkpoints are unlike those of the other layouts of its model."""
        return bool(self.kl) or "hidden_dropout" in self.megatron


PLAIN = {"distributed_optimizer": False}
MOVING = {"moe_router_bias_update_rate": 0.01}
"""The routers' bias is no parameter, but moves with every step."""
MUON = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest"}
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "pin_cpu_grads": False}
OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True}
AVERAGE = {"coefficient": 0.1, "refresh_every": 1, "refresh_decay": 0.75}
"""A reference policy that moves with every step, to be saved too."""
LAYOUTS = {
    "one": Layout(1),
    "data2": Layout(2),
    "data4": Layout(4),
    "tensor2": Layout(2, {"tensor": 2}),  # experts cut over tensor ranks too
    "pipeline2": Layout(2, {"pipeline": 2}),
    "interleaved": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "interleaved tensor2 expert2": Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "expert": 2}),
    "context2": Layout(2, {"context": 2}),
    "context2 data2": Layout(4, {"context": 2}),
    "expert2": Layout(2, {"expert": 2}),
    "expert4": Layout(4, {"expert": 4}),
    "tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2}),
    "tensor2 pipeline2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "tensor2 expert2 data2": Layout(4, {"tensor": 2, "expert": 2}),
    "pipeline2 expert2": Layout(4, {"pipeline": 2, "expert": 2}),
    "tensor2 context2 expert4": Layout(4, {"tensor": 2, "context": 2, "expert": 4}),
    "plain": Layout(1, PLAIN),
    "plain data2": Layout(2, PLAIN),
    "plain tensor2": Layout(2, {"tensor": 2, **PLAIN}),
    "plain tensor2 pipeline2": Layout(4, {"tensor": 2, "pipeline": 2, **PLAIN}),
    "bfloat16": Layout(1, dtype="bfloat16"),
    "bfloat16 data2": Layout(2, dtype="bfloat16"),
    "bfloat16 tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2}, dtype="bfloat16"),
    "bfloat16 plain tensor2": Layout(2, {"tensor": 2, **PLAIN}, dtype="bfloat16"),
    "tied": Layout(1, model="tied"),
    "tied pipeline2": Layout(2, {"pipeline": 2}, model="tied"),
    "tied tensor2 pipeline2": Layout(4, {"tensor": 2, "pipeline": 2, **PLAIN}, model="tied"),
    "deepseek": Layout(1, model="deepseek", megatron=MOVING),
    "deepseek tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2}, model="deepseek", megatron=MOVING),
    "deepseek bfloat16 pipeline2": Layout(2, {"pipeline": 2}, "bfloat16", "deepseek", MOVING),
    "gpt-oss tensor2": Layout(2, {"tensor": 2}, model="gpt-oss"),
    "gpt-oss tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2}, model="gpt-oss"),
    "muon": Layout(1, PLAIN, optimizer=MUON),
    "muon tensor2": Layout(2, {"tensor": 2, **PLAIN}, optimizer=MUON),
    "muon tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2, **PLAIN}, optimizer=MUON),
    "muon data2": Layout(2, PLAIN, optimizer=MUON),
    "muon bfloat16 tensor2 expert2": Layout(2, {"tensor": 2, "expert": 2, **PLAIN}, dtype="bfloat16", optimizer=MUON),
    "overlapped gather data2": Layout(2, OVERLAP, optimizer={"overlap_param_gather": True}),
    "overlapped gather pipeline2 data2": Layout(
        4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, optimizer={"overlap_param_gather": True}
    ),
    "offload bfloat16 data2": Layout(2, dtype="bfloat16", optimizer=OFFLOAD),
    "offload bfloat16 expert2": Layout(2, {"expert": 2}, dtype="bfloat16", optimizer=OFFLOAD),
    "dropout": Layout(2, {"tensor": 2}, megatron={"hidden_dropout": 0.2}),
    "reference": Layout(1, model="tied", kl=AVERAGE),
    "reference pipeline2": Layout(2, {"pipeline": 2}, model="tied", kl=AVERAGE),
    "reference bfloat16 tensor2": Layout(2, {"tensor": 2}, "bfloat16", kl=AVERAGE),
}
STRAIGHT = (2, 3, 4)
FAST = [
    "one",
    "interleaved",
    "tensor2 expert2 data2",
    "bfloat16 data2",
    "plain tensor2",
    "tied pipeline2",
    "dropout",
    "deepseek bfloat16 pipeline2",
    "muon bfloat16 tensor2 expert2",
    "overlapped gather data2",
    "offload bfloat16 expert2",
    "reference bfloat16 tensor2",
]
FAST_PAIRS = [
    ("one", "tensor2 expert2 data2"),
    ("tensor2 pipeline2", "expert4"),
    ("data4", "plain"),
    ("interleaved", "tensor2 context2 expert4"),
    ("plain tensor2 pipeline2", "data2"),
    ("bfloat16 data2", "bfloat16 plain tensor2"),
    ("bfloat16 plain tensor2", "bfloat16"),
    ("tied tensor2 pipeline2", "tied"),
    ("tied", "tied pipeline2"),
    ("deepseek tensor2 expert2", "deepseek"),
    ("gpt-oss tensor2", "gpt-oss tensor2 expert2"),
    ("muon tensor2 expert2", "muon"),
    ("data2", "overlapped gather data2"),
    ("offload bfloat16 data2", "bfloat16 data2"),
    ("bfloat16 data2", "offload bfloat16 data2"),
    ("reference", "reference pipeline2"),
]
"""From every axis to another and from none, both optimizers both ways."""


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return each to the first and from the first, and each to its neighbour a third of the list away."""
    first, *others = names
    both = [pair for name in others for pair in ((first, name), (name, first))]
    far = zip(names, [*names[len(names) // 3 :], *names[: len(names) // 3]], strict=True)
    return list(dict.fromkeys([*both, *(pair for pair in far if pair[0] != pair[1])]))


def kind_of(layout: Layout) -> tuple[str, str, object]:
    """Return what two layouts must share for one to continue the other: model, precision and optimizer."""
    return layout.model, layout.dtype, layout.optimizer.get("optimizer")


PAIRS = [
    pair
    for kind in dict.fromkeys(map(kind_of, LAYOUTS.values()))
    for pair in pairs_of([n for n, it in LAYOUTS.items() if kind_of(it) == kind and not it.is_special])
]


def work(model: str, folder: str, layout: Layout, saves: tuple[int, ...], resume: bool) -> dict[str, Tensor]:
    """Train on this rank up to each of ``saves``, writing a checkpoint there; a save at once writes what was loaded."""
    run = run_of(
        Path(model),
        model={"dtype": layout.dtype, "megatron": layout.megatron},
        parallel=layout.parallel,
        optimizer={"lr": 1e-3, "warmup_steps": 3, "weight_decay": 0.1, "megatron": layout.optimizer},
        checkpoint={"keep": 100},
        kl=layout.kl,
        log={"path": folder},
    )
    world = start_world(60, deterministic=True)
    if "optimizer_cpu_offload" in layout.optimizer:
        pretend_offload()
    torch.manual_seed(world.rank)
    policy = Policy(run, world, total_updates=8)
    checkpoints = Checkpoints(run, world, policy)
    if resume:
        assert checkpoints.load() == (policy.updates, {"next_prompt": 7})
    batch = policy.local_part(case())
    norms: list[float] = []
    scores: list[Tensor] = []
    for save in saves:
        while policy.updates < save:
            policy.forward_backward(batch, weighted)
            norms.append(policy.optim_step().grad_norm)
        scores.append(whole(policy, batch, policy.compute_logprobs(batch).as_old())["old_logprobs_T"])
        checkpoints.save(save if policy.updates == save else AGAIN, {"next_prompt": 7})
    checkpoints.finish()
    dist.barrier()
    return {"logprobs_ST": torch.stack(scores), "grad_norms": torch.tensor(norms)}


@dataclass(frozen=True)
class Rounding:
    """How far two layouts may be apart: log-probs in nats, gradient norm and the change of a step relative."""

    logprob: float
    grad_norm: float
    change: float


FLOAT32 = Rounding(1e-5, 1e-6, 2e-5)
"""As between layouts without a checkpoint: sums in another order. Measured: 1e-6, 1.2e-7, 3e-6."""
BFLOAT16 = Rounding(0.05, 0.01, 0.3)
"""Eight bits, and tokens whose two best experts nearly tie take another route. Measured: 0.002, 0.001, 0.14."""

AGAIN = 1
"""Under this step a loaded state is written once more, by whatever layout loaded it."""


def contents(folder: Path, model: Path, step: int) -> dict[str, Tensor]:
    """Return everything in a checkpoint under Hugging Face names, whoever wrote it."""
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    reader = open_sharded_state(checkpoint, read_meta(checkpoint))
    state: dict[str, Tensor] = {}
    for name, layer, expert in family_of(read_hf_config(model)).parameters():
        for kind in ("model", "main", "exp_avg", "exp_avg_sq", "momentum_buffer", "reference"):
            tensor = f"{kind}/{name.megatron_name(layer, expert)}"
            if tensor in reader:
                parts = reader.merged(tensor, name.rule)
                state |= {f"{kind} {n}": p for n, p in zip(name.hf_names(layer, expert), parts, strict=True)}
    return state


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of models; 19 rows of vocabulary are padded to 20 under tensor parallelism."""
    folder = tmp_path_factory.mktemp("models")
    tied = {name: save_model(folder / name, tied=name == "tied", vocabulary=19) for name in ("untied", "tied")}
    others = {"deepseek": "deepseek_v3", "gpt-oss": "gpt_oss"}
    return {**tied, **{name: families.save(family, folder / name) for name, family in others.items()}}


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory):
    """A function: layout -> (run folder, result) of four updates that nothing interrupted, saved on the way."""

    @cache
    def run(name: str) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path_factory.mktemp("straight")
        return folder, work_under(models, name, folder, STRAIGHT, resume=False)

    return run


def work_under(
    models: Mapping[str, Path], name: str, folder: Path, saves: tuple[int, ...], *, resume: bool
) -> dict[str, Tensor]:
    layout = LAYOUTS[name]
    if layout.optimizer == MUON:
        pytest.importorskip("emerging_optimizers", reason="Muon needs the package emerging-optimizers")
        if RELEASE < (0, 19):
            pytest.skip("Muon needs megatron-core 0.19")
    arguments = (str(models[layout.model]), str(folder), layout, saves, resume)
    return run_ranks(work, layout.ranks, *arguments, initialize=False, timeout_seconds=280)[0]


def resumable(straight: Path, folder: Path, step: int) -> Path:
    """Return a run folder that ends with this checkpoint of another run."""
    name = checkpoint_name(step)
    shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    return folder


def some(fast: Sequence[object], others: Iterable[object]) -> list[object]:
    """Return parameters: the fast ones for every run of the tests, the others for the slow suite."""
    return [*fast, *(pytest.param(other, marks=pytest.mark.slow) for other in others if other not in fast)]


@pytest.mark.parametrize("name", some(FAST, LAYOUTS), ids=str)
def test_two_and_two_updates_are_four_bit_for_bit(straight, models, tmp_path, name):
    whole, expected = straight(name)
    folder = resumable(whole, tmp_path, 2)

    result = work_under(models, name, folder, (3, 4), resume=True)

    for step in (3, 4):
        files = sorted((whole / "checkpoints" / checkpoint_name(step)).glob("*.safetensors"))
        assert len(files) == LAYOUTS[name].ranks
        assert all(file.read_bytes() == (folder / file.relative_to(whole)).read_bytes() for file in files)
    assert torch.equal(result["logprobs_ST"], expected["logprobs_ST"][1:])
    assert torch.equal(result["grad_norms"], expected["grad_norms"][2:])


@pytest.mark.parametrize("pair", some(FAST_PAIRS, PAIRS), ids=" to ".join)
def test_another_layout_goes_on_with_the_same_state(straight, models, tmp_path, pair):
    (whole, expected), model = straight(pair[0]), models[LAYOUTS[pair[0]].model]
    folder = resumable(whole, tmp_path, 2)

    result = work_under(models, pair[1], folder, (0, 3), resume=True)

    loaded, saved = contents(folder, model, AGAIN), contents(whole, model, 2)
    assert loaded.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []
    rounding = BFLOAT16 if LAYOUTS[pair[0]].dtype == "bfloat16" else FLOAT32
    off_ST = (result["logprobs_ST"] - expected["logprobs_ST"][:2]).abs()
    assert float(off_ST.mean()) < rounding.logprob
    torch.testing.assert_close(result["grad_norms"], expected["grad_norms"][2:3], rtol=rounding.grad_norm, atol=0)
    ours, target = contents(folder, model, 3), contents(whole, model, 3)
    changed = norm({name: target[name] - saved[name] for name in target})
    assert norm({name: target[name] - ours[name] for name in target}) < rounding.change * changed


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the norm over all tensors of one kind after the other, so that no kind drowns in another's scale."""
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())


def test_the_reference_is_a_moving_average_of_the_policy(straight, models):
    """Three references in float64 from the saved weights; rounded to float32 in each step."""
    folder, model = straight("reference")[0], models["tied"]
    saved = {step: contents(folder, model, step) for step in STRAIGHT}
    names = [name.removeprefix("reference ") for name in saved[2] if name.startswith("reference ")]
    assert len(names) > 10
    for before, after in ((2, 3), (3, 4)):
        for name in names:
            expected = (
                0.75 * saved[before][f"reference {name}"].double() + 0.25 * saved[after][f"model {name}"].double()
            )
            torch.testing.assert_close(saved[after][f"reference {name}"].double(), expected, rtol=2e-7, atol=1e-9)
    assert not all(torch.equal(saved[2][f"reference {name}"], saved[3][f"reference {name}"]) for name in names)


def test_the_bias_of_a_router_moves_and_is_saved(straight, models):
    (folder, _), model = straight("deepseek bfloat16 pipeline2"), models["deepseek"]
    before, after = contents(folder, model, 2), contents(folder, model, 4)
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert not any(torch.equal(before[name], after[name]) for name in biases)


@pytest.mark.parametrize(("wrote", "reads"), [("data2", "bfloat16"), ("bfloat16 tensor2 expert2", "one")])
def test_another_precision_goes_on_from_the_main_weights(straight, models, tmp_path, wrote, reads):
    folder = resumable(straight(wrote)[0], tmp_path, 2)

    work_under(models, reads, folder, (0,), resume=True)

    saved, loaded = contents(folder, models["untied"], 2), contents(folder, models["untied"], AGAIN)
    exact = {name.partition(" ")[2]: tensor for name, tensor in saved.items() if name.startswith("model ")}
    exact |= {name.partition(" ")[2]: tensor for name, tensor in saved.items() if name.startswith("main ")}
    for name, tensor in exact.items():
        assert torch.equal(loaded[f"model {name}"], tensor.to(loaded[f"model {name}"].dtype))
        assert torch.equal(loaded.get(f"main {name}", tensor), tensor)
        assert torch.equal(loaded[f"exp_avg_sq {name}"], saved[f"exp_avg_sq {name}"])


@pytest.mark.parametrize("name", ["tensor2 expert2 data2", "deepseek bfloat16 pipeline2"])
def test_a_checkpoint_is_a_model_folder_too(straight, models, name):
    folder, model = straight(name)[0], models[LAYOUTS[name].model]
    checkpoint = folder / "checkpoints" / checkpoint_name(2)
    family = family_of(read_hf_config(checkpoint))
    source = open_checkpoint(checkpoint, family)
    source.check(family)
    saved = contents(folder, model, 2)
    assert all(torch.equal(source.read(name), saved[f"model {name}"]) for name in family.hf_shapes())
    assert all(source.specs[name].dtype is saved[f"model {name}"].dtype for name in family.hf_shapes())


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
def test_a_changed_companion_of_a_checkpoint_is_noticed(straight, tmp_path, name):
    layout = "tensor2 expert2 data2"
    written = straight(layout)[0] / "checkpoints" / checkpoint_name(2)
    checkpoint = Path(shutil.copytree(written, tmp_path / "step_000002"))
    family = family_of(read_hf_config(checkpoint))
    changed = bytearray((checkpoint / name).read_bytes())
    digit = next(place for place, byte in enumerate(changed) if chr(byte).isdigit())
    changed[digit] ^= 1
    (checkpoint / name).write_bytes(changed)

    with pytest.raises(DataError, match=name):
        open_checkpoint(checkpoint, family)


def test_a_run_starts_from_the_weights_of_a_checkpoint(straight, tmp_path):
    folder, expected = straight("tensor2 expert2 data2")
    checkpoint = folder / "checkpoints" / checkpoint_name(2)

    result = work_under({"untied": checkpoint}, "one", tmp_path, (0,), resume=False)

    torch.testing.assert_close(result["logprobs_ST"][0], expected["logprobs_ST"][0], atol=FLOAT32.logprob, rtol=0)
