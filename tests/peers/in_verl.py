"""Calls the registered losses through verl's registry and its `ppo_loss`, and compares them with `policy_loss`.

FOLDER/bin/python tests/peers/in_verl.py

Runs in the environment of `tools/peer-env`, with the repository on PYTHONPATH; `test_verl.py` starts it. The output is
one JSON object: "registry", "ppo_loss" and "bypass" map an objective to the largest difference of loss and gradient, or
to the message of an error.
"""

import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import megatron_rl
from megatron_rl.algorithms.objectives import OBJECTIVES
from megatron_rl.api import Option
from megatron_rl.errors import ConfigError
from megatron_rl.integrations import verl as integration

LENGTHS, WIDTH, PROMPT, VOCABULARY_SIZE = (3, 9, 1, 5, 7, 2), 9, 4, 1000
RANKS = (((0, 1), (2,)), ((3, 4), (5,)))
"""Micro-batches, as rows, of each of two data-parallel ranks."""
MODES = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum": "sum"}
FIXED = {"espo", "gmpo", "soft_sequence"}
"""Objectives without the option ``aggregation``."""


def columns() -> dict[str, Tensor]:
    """Return the inputs of ``policy_loss`` as padded float64 tensors."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = len(LENGTHS)
    old = -noise(rows, WIDTH).abs() - 0.05
    return {
        "logprobs": (old + 0.3 * noise(rows, WIDTH)).clamp(max=-1e-3),
        "old_logprobs": old,
        "advantages": noise(rows, 1).expand(rows, WIDTH).contiguous(),
        "loss_mask": torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None],
        "entropies": noise(rows, WIDTH).abs(),
        "rollout_logprobs": (old + 0.1 * noise(rows, WIDTH)).clamp(max=-1e-3),
        "segment_ids": torch.arange(WIDTH).expand(rows, WIDTH) // 3,
        "factors": noise(rows, WIDTH).exp(),
    }


def options_of(name: str, mode: str) -> dict[str, Option]:
    """Return the objective's table for ``policy_loss``."""
    options: dict[str, Option] = {"name": name}
    if name not in FIXED:
        options["aggregation"] = MODES[mode]
    if name == "sspo":
        options["entropy_reference"] = 0.8
    return options


def expected(name: str, mode: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) of ``policy_loss`` on the whole mini-batch."""
    logprobs = inputs["logprobs"].clone().requires_grad_()
    result = megatron_rl.policy_loss(
        options_of(name, mode),
        logprobs=logprobs,
        old_logprobs=inputs["old_logprobs"],
        advantages=inputs["advantages"],
        loss_mask=inputs["loss_mask"],
        entropies=inputs["entropies"],
        segment_ids=inputs["segment_ids"] if name == "sspo" else None,
        rollout_logprobs=inputs["rollout_logprobs"],
        vocab_size=VOCABULARY_SIZE,
        factors=inputs["factors"],
    )
    return result.loss.detach(), torch.autograd.grad(result.loss, logprobs)[0]


def nested(column: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Return the response tokens of some rows without padding."""
    return torch.nested.as_nested_tensor([column[row, : LENGTHS[row]] for row in rows], layout=torch.jagged)


def through_ppo_loss(config: ActorConfig, inputs: Mapping[str, Tensor], rows: tuple[int, ...], leaf: Tensor) -> Tensor:
    """Return verl's loss of one micro-batch; its model output has prompt positions and is shifted by one token.

    With bypass nothing is passed beside verl's interface.
    """
    data = tensordict_utils.get_tensordict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(PROMPT).long() for _ in rows], layout=torch.jagged),
            "responses": nested(torch.zeros(len(LENGTHS), WIDTH).long(), rows),
            "response_mask": nested(inputs["loss_mask"].long(), rows),
            "old_log_probs": nested(inputs["old_logprobs"], rows),
            "advantages": nested(inputs["advantages"], rows),
            "rollout_is_weights": nested(inputs["factors"], rows),
        },
        {"dp_size": len(RANKS), "batch_num_tokens": sum(LENGTHS), "global_batch_size": len(LENGTHS)},
    )
    flat = [torch.cat([leaf.new_zeros(PROMPT - 1), leaf[row, : LENGTHS[row]], leaf.new_zeros(1)]) for row in rows]
    width = max(LENGTHS[row] for row in rows)
    extra = {key: inputs[key][list(rows), :width] for key in ("entropies", "segment_ids", "rollout_logprobs")}
    if not config.policy_loss.loss_mode.endswith("sspo"):
        del extra["segment_ids"]
    with integration.worker_columns(**{} if config.policy_loss.rollout_correction.bypass_mode else extra):
        return ppo_loss(config, {"log_probs": torch.cat(flat)}, data)[0]


def by_registry(name: str, mode: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) of the loss in verl's registry on the whole mini-batch."""
    leaf = inputs["logprobs"].clone().requires_grad_()
    segments = inputs["segment_ids"] if name == "sspo" else None
    with integration.worker_columns(inputs["entropies"], segments, inputs["rollout_logprobs"]):
        loss, _ = get_policy_loss_fn(f"mine.{name}")(
            old_log_prob=inputs["old_logprobs"],
            log_prob=leaf,
            advantages=inputs["advantages"],
            response_mask=inputs["loss_mask"].double(),
            loss_agg_mode=mode,
            config=ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True),
            rollout_is_weights=inputs["factors"],
        )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def by_workers(
    name: str, mode: str, inputs: Mapping[str, Tensor], *, bypass_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) of the micro-batches of two ranks: added on a rank, averaged over ranks."""
    correction = RolloutCorrectionConfig(bypass_mode=bypass_mode)
    policy = PolicyLossConfig(loss_mode=f"mine.{name}", rollout_correction=correction)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, loss_agg_mode=mode, policy_loss=policy)
    leaf = inputs["logprobs"].clone().requires_grad_()
    losses = [through_ppo_loss(config, inputs, rows, leaf) for rank in RANKS for rows in rank]
    loss = torch.stack(losses).sum() / len(RANKS)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def main() -> None:
    """Compare and print."""
    inputs = columns()
    bypassed = inputs | {"rollout_logprobs": inputs["old_logprobs"]}
    found: dict[str, dict[str, float | str]] = {"registry": {}, "ppo_loss": {}, "bypass": {}}
    for name in OBJECTIVES:
        assert get_policy_loss_fn(integration.PREFIX + name) is not None, name
        more = {"entropy_reference": 0.8} if name == "sspo" else {}
        integration.register(f"mine.{name}", {"name": name, **more}, VOCABULARY_SIZE)
        for kind, function, columns_of in (
            ("registry", by_registry, inputs),
            ("ppo_loss", by_workers, inputs),
            ("bypass", partial(by_workers, bypass_mode=True), bypassed),
        ):
            try:
                gaps = [gap(function(name, mode, columns_of), expected(name, mode, columns_of)) for mode in MODES]
            except ConfigError as error:
                found[kind][name] = str(error)
            else:
                found[kind][name] = max(gaps)
    print(json.dumps(found))


def gap(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return the largest difference of losses and gradients."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
