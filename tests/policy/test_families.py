"""Every family on megatron-core against transformers: logits, log-probs, gradients, bytes; on one rank and on two.

Legend: T tokens, V vocabulary, H hidden, B sequences.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from megatron_rl.data.minibatch import Minibatch, in_outline
from megatron_rl.data.types import Batch
from megatron_rl.distributed.collectives import gather_over
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from tests.minibatches import whole
from tests.policy import families
from tests.policy.families import MIXTURES, MODELS
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of
from tests.ranks import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "expert": (2, {"expert": 2}),
    "tensor and expert": (2, {"tensor": 2, "expert": 2}),
}
EVERY_TIME = {"one rank", "tensor and expert"}
"""Layouts of tools/check; the others are in the slow suite, but for a dense model and the one with most parts."""
CASES = [
    pytest.param(
        name,
        layout,
        id=f"{name}-{layout}",
        marks=[] if layout in EVERY_TIME or name in ("llama", "deepseek_v3") else pytest.mark.slow,
    )
    for name in MODELS
    for layout in LAYOUTS
    if "expert" not in layout or name in MIXTURES
]
HIDDEN = "hidden_TH"


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    found = {}
    for name in MODELS:
        folder = families.save(name, tmp_path_factory.mktemp(name))
        found[name] = folder, by_transformers(folder, case())
    return found


def by_transformers(folder: Path, batch: Batch) -> dict[str, Tensor]:
    """Return logits of every token, log-probs, and gradients under their names on disk, all in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    logits = []
    for start, length in zip(batch.starts_B.tolist(), batch.lengths_B.tolist(), strict=True):
        logits.append(model(batch["input_ids_T"][start : start + length][None]).logits[0])
    # The logits of a token predict the next one; the last of a sequence predicts none.
    logs_TV = torch.cat([torch.cat([own[:1] * 0, torch.log_softmax(own[:-1], dim=-1)]) for own in logits])
    chosen_T = logs_TV.gather(1, batch["input_ids_T"][:, None])[:, 0] * batch["loss_mask_T"]
    entropies_T = -(logs_TV.exp() * logs_TV).sum(-1) * batch["loss_mask_T"]
    ((batch["weights_T"] * chosen_T).sum() + (batch["extra_entropy_weights_T"] * entropies_T).sum()).backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        for own, gradient in revert_weight_conversion(model, {name: parameter.grad}).items():
            gradients[f"gradient.{own}"] = gradient
    return {"logits_TV": torch.cat(logits).detach(), "logprobs_T": chosen_T.detach(), **gradients}


def one_step(folder: str, parallel: dict[str, object], batch: Batch) -> dict[str, Tensor]:
    """Return this rank's part of everything to compare: the last stage has hidden states, the main rank the rest."""
    run = run_of(Path(folder), parallel=parallel, train={"tokens_per_microbatch": 2048})
    world = start_world(60, deterministic=True)
    policy = Policy(run, world, total_updates=1)
    part = policy.local_part(batch)
    hidden: list[Tensor] = []
    last = policy.chunks[-1].module
    if last.post_process:
        last.decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output.detach()))
    scored = policy.compute_logprobs(part)
    results = {f"weight.{name}": tensor.clone() for name, tensor in policy.weights(1 << 16)}
    if last.post_process:
        results[HIDDEN] = _in_order(hidden, part, policy)
    hidden.clear()
    policy.forward_backward(part, weighted, whole_gradients=True)
    results |= {f"gradient.{name}": tensor.clone() for name, tensor in policy.gradients()}
    logprobs = whole(policy, part, {"logprobs_T": scored.logprobs_T})
    results |= logprobs if world.is_main else {}
    dist.barrier()
    return results


def _in_order(hidden, part: Minibatch, policy: Policy) -> Tensor:
    """Return the last hidden state of this rank's tokens, in the order of the batch; zeros for those of other ranks."""
    ordered = torch.zeros(int(part.lengths_B.sum()), hidden[0].shape[-1])
    for row, part_T1H in zip(part.rows, hidden, strict=True):
        whole_RH = gather_over(policy.mesh.tensor, part_T1H[:, 0]).flatten(0, 1)
        real_R = row.token_ids_T >= 0
        ordered[row.token_ids_T[real_R]] = whole_RH[real_R]
    return in_outline(part, ordered)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_family_agrees_with_transformers_under_any_layout(truths, name: str, layout: str) -> None:
    folder, truth = truths[name]
    ranks, parallel = LAYOUTS[layout]

    ours: dict[str, Tensor] = {}
    for part in run_ranks(one_step, ranks, str(folder), parallel, case(), initialize=False, timeout_seconds=280):
        if HIDDEN in part and HIDDEN in ours:
            part[HIDDEN] = torch.where(ours[HIDDEN] == 0, part[HIDDEN], ours[HIDDEN])
        ours |= part

    on_disk = load_file(folder / "model.safetensors")
    head = on_disk["lm_head.weight" if "lm_head.weight" in on_disk else "model.embed_tokens.weight"]
    logits_TV = ours[HIDDEN].double() @ head.double().T
    # float32 against float64 over four layers; measured at most 2e-6.
    torch.testing.assert_close(logits_TV, truth["logits_TV"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["logprobs_T"].double(), truth["logprobs_T"], atol=1e-5, rtol=0)

    gradients = {key for key in truth if key.startswith("gradient.")}
    assert gradients == {key for key in ours if key.startswith("gradient.")}
    largest = max(float(truth[key].abs().max()) for key in gradients)
    for key in gradients:
        torch.testing.assert_close(ours[key].double(), truth[key], atol=5e-6 * largest, rtol=0, msg=key)

    assert {key.removeprefix("weight.") for key in ours if key.startswith("weight.")} == on_disk.keys()
    for key, tensor in on_disk.items():
        assert torch.equal(ours[f"weight.{key}"], tensor), key
