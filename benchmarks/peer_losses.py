"""Writes loss values and gradients of trl and verl on random batches, which `tests/peers/test_losses.py` compares with.

    tools/peer-env FOLDER && FOLDER/bin/python benchmarks/peer_losses.py tests/peers/losses.safetensors

Runs in the environment of trl and verl and calls their code with fixed log-probs: trl's `GRPOTrainer._compute_loss`,
with the model's outputs replaced, and verl's `core_algos` functions. The file has each batch and, under
`PEER/CASE/BATCH`, the loss in float32 and in float64 and the float64 gradient to the log-probs; its metadata has the
versions.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

ROWS, LONGEST = 8, 24
SPREADS = (1e-4, 1e-2, 0.1, 0.5, 1.0)
"""Standard deviation of the log ratios per batch: from nearly on-policy to mostly clipped."""

TRL: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "dapo": {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},  # trl takes the largest weight itself
}
UNREACHABLE = 1e6
"""An unreachable bound, where verl has a clip that the objective does not have."""
VERL: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "grpo": (
        "vanilla",
        "seq-mean-token-mean",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": UNREACHABLE},
    ),
    "dapo": ("vanilla", "token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": UNREACHABLE}),
    "gspo": ("gspo", "seq-mean-token-mean", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "sapo": ("sapo", "seq-mean-token-mean", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.3}),
}


@dataclass(frozen=True)
class PeerBatch:
    """A batch: log-probs [B, S], advantages [B], mask [B, S] of the response tokens."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> "PeerBatch":
        """Return the batch in another dtype; its log-probs are a leaf that requires a gradient."""
        logprobs = self.logprobs.to(dtype).detach().requires_grad_()
        return PeerBatch(logprobs, self.old_logprobs.to(dtype), self.advantages.to(dtype), self.mask)


def batch_of(seed: int, spread: float) -> PeerBatch:
    """Return a random batch with responses of 1 to S tokens, of two prompt groups with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (ROWS, 1), generator=generator)
    old = -torch.rand(ROWS, LONGEST, generator=generator).mul(3).exp().sub(0.99)
    new = old + spread * torch.randn(ROWS, LONGEST, generator=generator)
    rewards = torch.rand(2, ROWS // 2, generator=generator)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    mask = torch.arange(LONGEST) < lengths
    return PeerBatch(torch.where(mask, new, 0), torch.where(mask, old, 0), advantages.flatten(), mask)


def trl_loss(batch: PeerBatch, loss_type: str, level: str = "token", **epsilons: float) -> Tensor:
    """Return the loss of trl's trainer for these log-probs."""

    def model_outputs(*_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return batch.logprobs, torch.zeros_like(batch.logprobs), None

    def identity(tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=model_outputs,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=0.0,
        loss_type=loss_type,
        **epsilons,
        args=SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=identity, reduce=identity),
    )
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def verl_loss(batch: PeerBatch, function: str, aggregation: str, options: Mapping[str, Any]) -> Tensor:
    """Return the loss of verl's function for these log-probs."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **options)
    loss, _ = get_policy_loss_fn(function)(
        old_log_prob=batch.old_logprobs,
        log_prob=batch.logprobs,
        advantages=batch.advantages[:, None].expand(batch.mask.shape),
        response_mask=batch.mask.to(batch.logprobs.dtype),
        loss_agg_mode=aggregation,
        config=config,
    )
    return loss


def main() -> None:
    """Compute all losses and write the file."""
    calls: dict[str, Callable[[PeerBatch], Tensor]] = {}
    for case, options in TRL.items():
        calls[f"trl/{case}"] = lambda batch, options=options: trl_loss(batch, **options)
    for case, (function, aggregation, options) in VERL.items():
        calls[f"verl/{case}"] = lambda batch, f=function, a=aggregation, o=options: verl_loss(batch, f, a, o)
    tensors: dict[str, Tensor] = {}
    for number, spread in enumerate(SPREADS):
        batch = batch_of(number, spread)
        tensors |= {f"batch/{number}/{name}": tensor for name, tensor in vars(batch).items()}
        for name, call in calls.items():
            exact = batch.to(torch.float64)
            loss = call(exact)
            loss.backward()
            assert exact.logprobs.grad is not None
            tensors |= {
                f"{name}/{number}/float32": call(batch.to(torch.float32)).detach(),
                f"{name}/{number}/float64": loss.detach(),
                f"{name}/{number}/gradient": exact.logprobs.grad,
            }
    versions = {package: version(package) for package in ("trl", "verl", "torch")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[1], metadata=versions)
    print(f"{len(calls)} losses on {len(SPREADS)} batches, {versions}: {sys.argv[1]}")


if __name__ == "__main__":
    main()
