"""One rank of a layout: scoring, loss, backward pass and optimizer step, with the results saved for comparison."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.algorithms.loss import make_loss, prepare, summary
from megatron_rl.config.schema import Run
from megatron_rl.data.files import load_batch
from megatron_rl.data.minibatch import Minibatch, in_outline
from megatron_rl.data.vocabulary import Vocabulary
from megatron_rl.distributed.mesh import start_world
from megatron_rl.policy.engine import Policy
from megatron_rl.prove.case import CASE, RESULT, RUNS, perturbed_logprobs


def main(folder: Path) -> int:
    """Run the step described in ``folder`` for each objective. The main rank writes the results to ``folder``."""
    described = json.loads((folder / RUNS).read_text(encoding="utf-8"))
    runs = [Run.model_validate(run) for run in described["runs"]]
    world = start_world(runs[0].train.step_timeout_seconds, deterministic=None)
    policy = Policy(runs[0], world, total_updates=len(runs))
    batch = policy.local_part(load_batch(folder / CASE))
    scored = policy.compute_logprobs(batch)
    columns = {"logprobs_T": scored.logprobs_T, "entropies_T": scored.entropies_T}
    tensors: dict[str, Tensor] = {name: policy.total(in_outline(batch, each)) for name, each in columns.items()}
    if "old_logprobs_T" not in batch:  # the reference run: all layouts use its log-probs plus noise
        batch = batch.add(perturbed_logprobs(batch, scored.as_old()))
    # Random tokens have no text: let every seventh token end a sentence, which gives segments of all lengths.
    size = policy.family.vocab_size
    vocabulary = Vocabulary(size, tuple(b"." if token % 7 == 0 else b"a" for token in range(size)))
    batch = batch.add(scored.as_current())
    for run in runs:
        results = _step(policy, batch, run, vocabulary)
        tensors |= {f"{run.objective.name}/{name}": tensor for name, tensor in results.items()}
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / RESULT)
    dist.destroy_process_group()
    return 0


def _step(policy: Policy, batch: Minibatch, run: Run, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Return loss, metrics, gradient norm and gradients of one objective. Weights are restored."""
    columns = prepare(batch, run.objective, run.correction, vocabulary, total=policy.total, entropy=run.entropy)
    prepared = batch.add(columns)
    metrics = summary(policy.forward_backward(prepared, make_loss(run.objective), whole_gradients=True))
    results = {f"metric.{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    results |= {f"gradient.{name}": gradient.clone() for name, gradient in policy.gradients()}
    with policy.preserve_weights():
        results["metric.grad_norm"] = torch.tensor(policy.optim_step().grad_norm, dtype=torch.float64)
    return results
