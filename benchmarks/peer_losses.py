"""Writes loss values and gradients of trl and verl on random batches, which `tests/peers/test_losses.py` compares with.

    tools/peer-env FOLDER && FOLDER/bin/python benchmarks/peer_losses.py tests/peers/losses.safetensors

Runs in the environment of trl and verl and calls their code with fixed log-probs: trl's `GRPOTrainer._compute_loss`,
with the model's outputs replaced, and verl's policy losses, rollout correction and KL estimators. The file has each
batch and, under `PEER/CASE/BATCH`, the loss in float32 and in float64 and the float64 gradient to the log-probs of the
response tokens; its metadata has the versions.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOTrainer
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

ROWS, LONGEST = 8, 24
SPREADS = (1e-4, 1e-2, 0.1, 0.5, 1.0)
"""Standard deviation of the log ratios per batch: from nearly on-policy to mostly clipped."""
ROLLOUT_SPREAD = 0.3
"""Standard deviation of the trainer's old log-probs minus the engine's."""
UNREACHABLE = 1e6
"""An unreachable bound, where verl has a clip that the objective does not have."""

TRL: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo two-sided": {"loss_type": "grpo", "delta": 1.5},
    "grpo opsm": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    "grpo opsm engine": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05, "has_engine": True},
    "grpo top entropy": {"loss_type": "grpo", "top_entropy_quantile": 0.2},
    "grpo k3": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "grpo unbiased": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "bnpo": {"loss_type": "bnpo"},
    "dr grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo entropy bonus": {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.05},
    "gspo": {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "luspo": {"loss_type": "luspo", "level": "sequence"},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},  # trl takes the largest weight itself
    "vespo": {"loss_type": "vespo"},
}
"""Case -> settings of trl's trainer."""

TOKENS, RESPONSES, SUMS, CONSTANT = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
PPO: Mapping[str, Any] = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": UNREACHABLE}
GATE = "0.9_1.1"


@dataclass(frozen=True)
class VerlCase:
    """A call of verl.

    Attributes:
        function: name in the registry of policy losses.
        aggregation: ``loss_agg_mode``.
        options: fields of ``ActorConfig``; None: GRPO's window.
        policy: fields of ``PolicyLossConfig``.
        correction: fields of ``RolloutCorrectionConfig``; with ``bypass_mode`` the policy loss reads them.
        is_engine_old: the engine's log-probs take the place of the old ones.
        is_on_policy: the current log-probs take the place of the old ones.
        kl: an estimator whose mean, times 0.1, is added.
    """

    function: str
    aggregation: str = TOKENS
    options: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] | None = None
    correction: Mapping[str, Any] | None = None
    is_engine_old: bool = False
    is_on_policy: bool = False
    kl: str | None = None


def corrected(**correction: Any) -> VerlCase:
    """Return GRPO with a rollout correction."""
    return VerlCase("vanilla", correction={"rollout_is": None, **correction})


def bypassed(**correction: Any) -> VerlCase:
    """Return a loss straight against the engine."""
    settings = {"rollout_is": None, "bypass_mode": True, **correction}
    return VerlCase("bypass_mode", correction=settings, is_engine_old=True)


VERL: Mapping[str, VerlCase] = {
    "grpo": VerlCase("vanilla", RESPONSES),
    "grpo sum": VerlCase("vanilla", SUMS),
    "grpo dual clip": VerlCase("vanilla", RESPONSES, {**PPO, "clip_ratio_c": 1.5}),
    "dr grpo": VerlCase("vanilla", CONSTANT),
    "dapo": VerlCase("vanilla", TOKENS, {**PPO, "clip_ratio_high": 0.28}),
    "gspo": VerlCase("gspo", RESPONSES, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "gspo token": VerlCase("gspo", TOKENS, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "luspo": VerlCase("gspo", SUMS),
    "sapo": VerlCase("sapo", options={"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": VerlCase("cispo", options={"clip_ratio_low": 1.0, "clip_ratio_high": 0.3}),
    "gmpo": VerlCase("geo_mean", options={"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    "reinforce": VerlCase("gpg"),
    "dro": VerlCase("dro", policy={"dro_beta": 0.1}),
    "dppo tv": VerlCase("dppo_tv", options={**PPO, "clip_ratio_c": 20.0}, is_engine_old=True),
    "dppo kl": VerlCase(
        "dppo_kl", options={"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}, is_engine_old=True
    ),
    "clip-cov": VerlCase(
        "clip_cov",
        policy={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.5},
        is_on_policy=True,
    ),
    "kl-cov": VerlCase("kl_cov", policy={"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}),
    "tis token": corrected(rollout_is="token"),
    "tis response": corrected(rollout_is="sequence"),
    "icepop": corrected(rollout_is="token", rollout_is_threshold="0.5_2"),
    "geometric gate": corrected(rollout_rs="seq_mean_k1", rollout_rs_threshold=GATE),
    "geometric gate, tis": corrected(rollout_is="token", rollout_rs="seq_mean_k1", rollout_rs_threshold=GATE),
    "product gate": corrected(rollout_rs="seq_sum_k1", rollout_rs_threshold="0.5_2"),
    "token gate": corrected(rollout_rs="token_k1", rollout_rs_threshold="0.8_1.4"),
    "k3 gate of tokens": corrected(rollout_rs="token_k3", rollout_rs_threshold=0.05),
    "k3 gate of means": corrected(rollout_rs="seq_mean_k3", rollout_rs_threshold=0.05),
    "k3 gate of maxima": corrected(rollout_rs="seq_max_k3", rollout_rs_threshold=0.2),
    "bypass": bypassed(),
    "bypass tis": bypassed(loss_type="reinforce", rollout_is="token"),
    "bypass icepop": bypassed(loss_type="reinforce", rollout_is="token", rollout_is_threshold="0.8_1.28"),
    "bypass geometric gate": bypassed(rollout_rs="seq_mean_k1", rollout_rs_threshold=GATE),
    "k1": VerlCase("gpg", kl="k1"),
    "k2": VerlCase("gpg", kl="k2"),
    "k3": VerlCase("gpg", kl="k3"),
    "abs": VerlCase("gpg", kl="abs"),
}


@dataclass(frozen=True)
class PeerBatch:
    """A batch: log-probs and entropies [B, S], advantages [B], mask [B, S] of the response tokens."""

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor
    entropies: Tensor
    advantages: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> "PeerBatch":
        """Return the batch in another dtype; its log-probs are a leaf that requires a gradient."""
        columns = {field.name: getattr(self, field.name).to(dtype) for field in fields(self)[:-1]}
        return PeerBatch(**columns | {"logprobs": columns["logprobs"].detach().requires_grad_()}, mask=self.mask)


def batch_of(seed: int, spread: float) -> PeerBatch:
    """Return a random batch with responses of 1 to S tokens, of two prompt groups with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (ROWS, 1), generator=generator)
    old = -torch.rand(ROWS, LONGEST, generator=generator).mul(3).exp().sub(0.99)

    def near(logprobs: Tensor, distance: float) -> Tensor:
        return (logprobs + distance * torch.randn(ROWS, LONGEST, generator=generator)).clamp(max=-1e-3)

    rewards = torch.rand(2, ROWS // 2, generator=generator)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    columns = (near(old, spread), old, near(old, ROLLOUT_SPREAD), near(old, 0.5))
    entropies = torch.rand(ROWS, LONGEST, generator=generator) * 2
    mask = torch.arange(LONGEST) < lengths
    new, old, rollout, ref, entropies = (torch.where(mask, column, 0) for column in (*columns, entropies))
    return PeerBatch(new, old, rollout, ref, entropies, advantages.flatten(), mask)


def trl_loss(
    batch: PeerBatch,
    loss_type: str,
    level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    has_engine: bool = False,
    entropy_coef: float = 0.0,
    **settings: Any,
) -> Tensor:
    """Return the loss of trl's trainer for these log-probs."""
    arguments = {
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
        "use_bias_correction_kl": True,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }

    def model_outputs(*_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        return batch.logprobs, batch.entropies, None

    def identity(tensor: Tensor, **_: object) -> Tensor:
        return tensor

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=model_outputs,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        aux_loss_enabled=False,
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=settings.get("beta", 0.0),
        top_entropy_quantile=settings.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        max_completion_length=LONGEST,
        args=SimpleNamespace(**arguments | {name: settings[name] for name in arguments if name in settings}),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=entropy_coef > 0,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=identity,
            reduce=identity,
            pad_across_processes=identity,
            sync_gradients=True,
        ),
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs,
        "num_items_in_batch": mask.sum(),
    }
    if has_engine:
        inputs["sampling_per_token_logps"] = batch.rollout_logprobs
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def verl_loss(batch: PeerBatch, case: VerlCase) -> Tensor:
    """Return the loss of verl for these log-probs; the denominators are the mini-batch's counts, as in its workers."""
    if case.is_engine_old:
        batch = replace(batch, old_logprobs=batch.rollout_logprobs)
    if case.is_on_policy:
        batch = replace(batch, old_logprobs=batch.logprobs.detach())
    correction = None if case.correction is None else RolloutCorrectionConfig(**case.correction)
    policy = PolicyLossConfig(**case.policy or {}, **({"rollout_correction": correction} if correction else {}))
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy, **case.options or PPO)
    mask = batch.mask.to(batch.logprobs.dtype)
    counts = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": ROWS}
    config.global_batch_info.update(counts)
    weights, kept = None, mask
    if correction and not correction.bypass_mode:
        names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
        found, kept, _ = compute_rollout_correction_and_rejection_mask(
            old_log_prob=batch.old_logprobs,
            rollout_log_prob=batch.rollout_logprobs,
            response_mask=mask,
            **{name: getattr(correction, name) for name in names},
        )
        weights = found.batch["rollout_is_weights"] if found else None
    loss, _ = get_policy_loss_fn(case.function)(
        old_log_prob=batch.old_logprobs,
        log_prob=batch.logprobs,
        advantages=batch.advantages[:, None].expand(mask.shape),
        response_mask=kept,
        loss_agg_mode=case.aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    if case.kl is None:
        return loss
    return loss + 0.1 * agg_loss(
        kl_penalty(batch.logprobs, batch.ref_logprobs, case.kl), mask, case.aggregation, **counts
    )


def main() -> None:
    """Compute all losses and write the file."""
    calls: dict[str, Callable[[PeerBatch], Tensor]] = {}
    calls |= {f"trl/{name}": partial(trl_loss, **settings) for name, settings in TRL.items()}
    calls |= {f"verl/{name}": partial(verl_loss, case=case) for name, case in VERL.items()}
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
                f"{name}/{number}/gradient": exact.logprobs.grad[exact.mask],
            }
    versions = {package: version(package) for package in ("trl", "verl", "torch")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[1], metadata=versions)
    print(f"{len(calls)} losses on {len(SPREADS)} batches, {versions}: {sys.argv[1]}")


if __name__ == "__main__":
    main()
