"""The policy on megatron-core against transformers: values, gradients, weights, on one rank and on several."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch, Loss, Metrics
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy.tiny import by_transformers, case, lonely_case, run_of, save_model
from tests.ranks import RankError, run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context": (2, {"context": 2}),
    "expert": (2, {"expert": 2}),
    "tensor and expert": (2, {"tensor": 2, "expert": 2}),
    "data": (2, {}),
}


def weighted(logprobs_R: Tensor, entropies_R: Tensor, inputs: LossInputs) -> Loss:
    """Return a loss in which every log-prob and entropy has a weight of its own."""
    value = (inputs.weights_R.to(logprobs_R) * logprobs_R).sum()
    value = value + (inputs.extra["entropy_weights"].to(logprobs_R) * entropies_R).sum()
    largest = logprobs_R.detach().amax() if len(logprobs_R) else torch.tensor(-1e9)
    kept = {"kept_logprobs_T": logprobs_R.detach(), "kept_places_T": inputs.extra["places"]}
    return Loss(value, Metrics({"loss": value.detach()}, {"logprob": largest}, kept))


def one_step(
    folder: str, parallel: dict[str, object], model: dict[str, object], batch: Batch
) -> dict[str, Tensor] | None:
    """Score, accumulate and step on this rank; the main rank returns everything, the others nothing."""
    run = run_of(Path(folder), parallel=parallel, model=model)
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=1)
    part = policy.local_part(batch)
    scored = policy.compute_logprobs(part)
    exported = {f"weight.{name}": tensor.clone() for name, tensor in policy.weights(1 << 16)}
    metrics = policy.forward_backward(part, weighted, whole_gradients=True)
    gradients = {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    report = policy.optim_step()
    columns = {"logprobs_T": scored.logprobs_T, "entropies_T": scored.entropies_T, **metrics.tokens}
    results = whole(policy, part, columns)
    results |= {"loss": metrics.sums["loss"], "grad_norm": torch.tensor(report.grad_norm), **gradients, **exported}
    return results if world.is_main else None


def step_under(folder: Path, layout: str, batch: Batch | None = None, **model: object) -> dict[str, Tensor]:
    ranks, parallel = LAYOUTS[layout]
    # Forked, with megatron-core imported here: importing it again on every rank would be most of the test's time.
    arguments = (str(folder), parallel, model, batch or case())
    results = run_ranks(one_step, ranks, *arguments, initialize=False, timeout_seconds=280)
    assert results[0] is not None
    return results[0]


@pytest.fixture(scope="module")
def truth(model: Path) -> dict[str, Tensor]:
    return by_transformers(model, case())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_policy_agrees_with_transformers_under_any_layout(model: Path, truth: dict[str, Tensor], layout: str) -> None:
    ours = step_under(model, layout)

    # float32 against float64: log-probs of a few nats carry 2^-23 a layer and operation.
    torch.testing.assert_close(ours["logprobs_T"].double(), truth["logprobs_T"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["entropies_T"].double(), truth["entropies_T"], atol=1e-5, rtol=0)
    gradients = {name for name in truth if name.startswith("gradient.")}
    assert gradients == {name for name in ours if name.startswith("gradient.")}
    largest = max(float(truth[name].abs().max()) for name in gradients)
    for name in gradients:
        # Gradients sum hundreds of float32 products: 5e-6 of the largest one (measured: 6e-7).
        torch.testing.assert_close(ours[name].double(), truth[name], atol=5e-6 * largest, rtol=0, msg=name)
    norm = torch.stack([truth[name].square().sum() for name in gradients]).sum().sqrt()
    torch.testing.assert_close(ours["grad_norm"].double(), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_loss_keeps_of_tokens_comes_back_in_their_places(model: Path, layout: str) -> None:
    batch = case()
    trained_T = batch["loss_mask_T"]

    ours = step_under(model, layout)

    assert ours["kept_places_T"].tolist() == (batch["extra_places_T"] * trained_T).tolist()
    # The forward pass that trains is the one that scored, and what is not trained has no log-prob.
    assert torch.equal(ours["kept_logprobs_T"], ours["logprobs_T"])
    assert not ours["kept_logprobs_T"][~trained_T].any()
    assert ours["kept_logprobs_T"][trained_T].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_idle_experts_and_ranks_without_a_token_change_nothing(model: Path, layout: str) -> None:
    batch = lonely_case()
    truth = by_transformers(model, batch)

    ours = step_under(model, layout, batch)

    torch.testing.assert_close(ours["logprobs_T"].double(), truth["logprobs_T"], atol=1e-5, rtol=0)  # as above
    gradients = [name for name in truth if name.startswith("gradient.")]
    idle = [name for name in gradients if "experts" in name and not truth[name].any()]
    assert idle, "the case leaves no expert idle"
    largest = max(float(truth[name].abs().max()) for name in gradients)
    for name in gradients:
        atol = 0 if name in idle else 5e-6 * largest  # as above; nothing may reach an idle expert
        torch.testing.assert_close(ours[name].double(), truth[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("layout", ["one rank", "tensor", "pipeline", "tensor and expert"])
def test_weights_come_back_byte_for_byte(model: Path, layout: str) -> None:
    on_disk = load_file(model / "model.safetensors")

    ours = step_under(model, layout)

    exported = {name.removeprefix("weight."): value for name, value in ours.items() if name.startswith("weight.")}
    assert exported.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("end", ["first", "last"])
def test_a_pipeline_of_uneven_stages_changes_nothing(model: Path, truth: dict[str, Tensor], end: str) -> None:
    on_disk = load_file(model / "model.safetensors")

    ours = step_under(model, "pipeline", megatron={f"num_layers_in_{end}_pipeline_stage": 1})

    torch.testing.assert_close(ours["logprobs_T"].double(), truth["logprobs_T"], atol=1e-5, rtol=0)  # as above
    gradients = [name for name in truth if name.startswith("gradient.")]
    largest = max(float(truth[name].abs().max()) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(ours[name].double(), truth[name], atol=5e-6 * largest, rtol=0, msg=name)  # as above
    for name, tensor in on_disk.items():
        assert torch.equal(ours[f"weight.{name}"], tensor), name


@pytest.mark.parametrize("layout", ["one rank", "pipeline", "tensor"])
def test_tied_embeddings_give_the_same_gradient(tmp_path: Path, layout: str) -> None:
    folder = save_model(tmp_path, tied=True)
    truth = by_transformers(folder, case())

    ours = step_under(folder, layout)

    name = "gradient.model.embed_tokens.weight"
    atol = 5e-6 * float(truth[name].abs().max())  # as above
    torch.testing.assert_close(ours[name].double(), truth[name], atol=atol, rtol=0)


def test_the_load_balancing_loss_reaches_the_router(model: Path, truth: dict[str, Tensor]) -> None:
    aux = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}

    ours = step_under(model, "one rank", megatron=aux)

    name = "gradient.model.layers.0.mlp.gate.weight"
    change = (ours[name].double() - truth[name]).norm() / truth[name].norm()
    assert float(change) > 1e-3  # otherwise the proof over layouts would compare nothing
    other = "gradient.lm_head.weight"  # after all routers: not touched
    torch.testing.assert_close(ours[other].double(), truth[other], atol=5e-6 * float(truth[other].abs().max()), rtol=0)


def test_bfloat16_stays_near_float32(model: Path, truth: dict[str, Tensor]) -> None:
    ours = step_under(model, "tensor and expert", dtype="bfloat16")

    # bfloat16 keeps 8 bits, and a token whose two best experts nearly tie may take another route.
    assert float((ours["logprobs_T"].double() - truth["logprobs_T"]).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(2)}), "extra: model.extra"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(8, 65)}),
            r"wrong shape: model.layers.0.mlp.gate.weight is \[8, 65\], expected \[8, 64\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    model: Path, tmp_path: Path, change: object, message: str
) -> None:
    tensors = load_file(model / "model.safetensors")
    assert callable(change)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())

    with pytest.raises(RankError, match=message):
        step_under(tmp_path, "one rank")


def test_a_truncated_file_is_an_error_that_names_it(model: Path, tmp_path: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config.json").write_text((model / "config.json").read_text())

    with pytest.raises(RankError, match=r"model\.safetensors is not a readable safetensors file"):
        step_under(tmp_path, "one rank")
