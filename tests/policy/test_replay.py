"""Routing replay: the same experts under every layout, and exactly the ones that were given."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe

from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.data.types import Batch, Loss, Metrics
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy.test_parity import weighted
from tests.policy.tiny import by_transformers, case, run_of, save_model
from tests.ranks import RankError, run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYERS, EXPERTS, PER_TOKEN = 3, 8, 2
"""With experts: layer 1 of 4 has none."""

LAYOUTS: dict[str, tuple[int, dict[str, object], str]] = {
    "tensor": (2, {"tensor": 2}, "none"),
    "pipeline, recomputed": (2, {"pipeline": 2}, "full"),
    "interleaved, recomputed": (2, {"pipeline": 2, "virtual_pipeline": 2}, "full"),
    "context": (2, {"context": 2}, "none"),
    "tensor and expert, recomputed": (2, {"tensor": 2, "expert": 2}, "full"),
    "data": (2, {}, "none"),
}


def given() -> Batch:
    """Return the case with a route for every token but each sequence's last and some others."""
    batch, generator = case(), torch.Generator().manual_seed(11)
    total = int(batch.lengths_B.sum())
    scores = torch.rand(total, LAYERS, EXPERTS, generator=generator)
    routed_T = torch.rand(total, generator=generator) > 0.1
    routed_T[batch.starts_B + batch.lengths_B - 1] = False
    routes_TLE = scores.topk(PER_TOKEN, dim=-1).indices.to(torch.uint8)
    return batch.add({"rollout_routes_T": routes_TLE, "rollout_routed_T": routed_T})


def one_step(folder: str, mode: str, parallel: dict[str, object], recompute: str) -> dict[str, Tensor] | None:
    run = run_of(Path(folder), parallel=parallel, rollout={"routing_replay": mode}, model={"recompute": recompute})
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=1)
    batch = policy.local_part(given())
    scored = policy.compute_logprobs(batch).as_old()
    policy.forward_backward(batch.add(scored), weighted, whole_gradients=True)
    gradients = {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    scored = whole(policy, batch, scored)
    return {**scored, **gradients} if world.is_main else None


def step_under(folder: Path, mode: str, ranks: int, parallel: dict[str, object], recompute: str) -> dict[str, Tensor]:
    results = run_ranks(one_step, ranks, str(folder), mode, parallel, recompute, initialize=False, timeout_seconds=280)
    assert results[0] is not None
    return results[0]


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Tensor]:
    return step_under(model, "r3", 1, {}, "none")


def agree(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    # float32 on both sides, other orders of summation: as in test_parity.
    torch.testing.assert_close(ours["old_logprobs_T"].double(), truth["old_logprobs_T"].double(), atol=1e-5, rtol=0)
    gradients = {name for name in truth if name.startswith("gradient.")}
    assert gradients == {name for name in ours if name.startswith("gradient.")}
    largest = max(float(truth[name].abs().max()) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(ours[name].double(), truth[name].double(), atol=5e-6 * largest, rtol=0, msg=name)


def test_given_experts_are_taken_with_the_routers_own_gates(
    model: Path, alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = given()
    ends_B = batch.starts_B + batch.lengths_B
    queue = [
        (batch["rollout_routes_T"][start:end, layer].long(), batch["rollout_routed_T"][start:end])
        for start, end in zip(batch.starts_B.tolist(), ends_B.tolist(), strict=True)
        for layer in range(LAYERS)
    ]

    def forced(router: modeling_qwen3_moe.Qwen3MoeTopKRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        given_TE, known_T = queue.pop(0)
        chosen_TE = torch.where(known_T[:, None], given_TE, logits.topk(PER_TOKEN).indices)
        return logits, logits.gather(1, chosen_TE).softmax(-1), chosen_TE

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", forced)
    truth = by_transformers(model, batch)

    assert not queue
    assert truth["gradient.model.layers.0.mlp.gate.weight"].abs().max() > 0
    agree(alone, {**truth, "old_logprobs_T": truth["logprobs_T"]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_agrees_with_one_rank_under_any_layout(model: Path, alone: dict[str, Tensor], layout: str) -> None:
    ours = step_under(model, "r3", *LAYOUTS[layout])

    agree(ours, alone)
    assert torch.equal(ours["routing_differs_T"], alone["routing_differs_T"])


def test_the_report_counts_layers_and_replays_nothing(model: Path, alone: dict[str, Tensor]) -> None:
    live = step_under(model, "none", 1, {}, "none")
    report = step_under(model, "report", 2, {"tensor": 2, "expert": 2}, "none")

    agree(report, live)
    assert float((alone["old_logprobs_T"] - live["old_logprobs_T"]).abs().max()) > 1e-3
    differs_T, routed_T = report["routing_differs_T"], given()["rollout_routed_T"]
    assert not differs_T[~routed_T].any()
    # Two of eight at random are the router's two once in 28.
    share = float(differs_T[routed_T].double().mean()) / LAYERS
    assert share == pytest.approx(27 / 28, abs=0.03)


def distance(logprobs_R: Tensor, _entropies_R: Tensor, inputs: LossInputs) -> Loss:
    """A loss that measures how far the log-probs of the training pass are from those of the scoring pass."""
    apart = (logprobs_R - inputs.old_logprobs_R.to(logprobs_R)).abs()
    return Loss(logprobs_R.sum(), Metrics({}, {"apart": apart.detach().amax() if len(apart) else apart.sum()}))


def noisy_ratios(folder: str, mode: str, parallel: dict[str, object], recompute: str) -> tuple[float, float]:
    """Return the largest distance of a first ratio from 1, by router-side noise, and of the routes that were kept."""
    run = run_of(Path(folder), parallel=parallel, rollout={"routing_replay": mode}, model={"recompute": recompute})
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=1)
    # Another choice at every call, as rounding on a busy GPU may give, with the scores left as they are.
    topk, generator = torch.topk, torch.Generator().manual_seed(world.rank)

    def noisy(scores: Tensor, k: int, dim: int, **_: bool) -> tuple[Tensor, Tensor]:
        chosen = topk(scores.detach() + torch.rand(scores.shape, generator=generator), k=k, dim=dim).indices
        return scores.gather(dim, chosen), chosen

    setattr(torch, "topk", noisy)  # noqa: B010 (of this rank's process alone)
    batch = policy.local_part(case())
    batch = batch.add(policy.compute_logprobs(batch).as_old())
    metrics = policy.forward_backward(batch, distance)
    return float(metrics.maxima["apart"]), float(batch["routes_T"].double().mean()) if "routes_T" in batch else 0.0


@pytest.mark.parametrize("layout", ["interleaved, recomputed", "tensor and expert, recomputed"])
def test_first_ratios_are_exactly_one_under_r2_whatever_the_router_does(model: Path, layout: str) -> None:
    ranks, parallel, recompute = LAYOUTS[layout]

    def apart(mode: str) -> float:
        arguments = (str(model), mode, parallel, recompute)
        return run_ranks(noisy_ratios, ranks, *arguments, initialize=False, timeout_seconds=280)[0][0]

    assert apart("r2") == 0.0
    assert apart("none") > 1e-3


def scored_and_trained(folder: str) -> float:
    policy = Policy(run_of(Path(folder)), start_world(60, deterministic=True), total_updates=1)
    batch = policy.local_part(case())
    batch = batch.add(policy.compute_logprobs(batch).as_old())
    return float(policy.forward_backward(batch, distance).maxima["apart"])


def test_first_ratios_are_exactly_one_with_many_experts_per_token(tmp_path: Path) -> None:
    # With two experts per token the sum of the gates commutes, and a different order of the experts cannot be seen.
    save_model(tmp_path, experts=64, experts_per_token=8)
    assert run_ranks(scored_and_trained, 1, str(tmp_path), initialize=False)[0] == 0.0


def misshapen(folder: str) -> None:
    run = run_of(Path(folder), rollout={"routing_replay": "r3"})
    policy = Policy(run, start_world(60, deterministic=True), total_updates=1)
    batch = policy.local_part(given())
    policy.compute_logprobs(batch.add({"rollout_routes_T": batch["rollout_routes_T"][:, :2]}))


def test_a_record_of_another_shape_is_refused(model: Path) -> None:
    with pytest.raises(RankError, match=r"rollout_routes_T is \[2, 2\] for each token, the model needs \[3, 2\]"):
        run_ranks(misshapen, 1, str(model), initialize=False)
