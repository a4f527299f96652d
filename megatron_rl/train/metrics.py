"""One step's line of ``metrics.jsonl``: from the batch, the scores, and each update's sums.

Legend: T tokens, B responses.
"""

import torch
from torch import Tensor

from megatron_rl.advantages import zero_variance_groups
from megatron_rl.data.types import Batch, Metrics
from megatron_rl.loss import mismatch
from megatron_rl.policy.engine import StepReport


class StepMetrics:
    """Gathers what a step tells, in the order in which it happens."""

    def __init__(self, step: int) -> None:
        self._values: dict[str, float | int | None] = {"weight_version": step}
        self._updates: list[tuple[Metrics, StepReport]] = []

    def evaluated(self, result: tuple[float, int] | None) -> None:
        """Take an accuracy and the number of prompts behind it."""
        if result is not None:
            self._values |= {"accuracy": result[0], "evaluated_prompts": result[1]}

    def sampled(self, batch: Batch) -> None:
        """Take the batch as it was sampled."""
        verified_B = batch["verified_B"]
        rewards = batch["rewards_B"][verified_B]
        self._values |= {
            "reward_mean": _mean(rewards),
            "reward_std": float(rewards.std(unbiased=False)) if len(rewards) else None,
            "unverified_fraction": _mean(~verified_B),
            "response_tokens_mean": _mean(batch.trainable_counts_B),
            "truncated_fraction": _mean(batch["truncated_B"]),
            "zero_variance_fraction": _mean(zero_variance_groups(batch["rewards_B"], batch["group_ids_B"], verified_B)),
            "tokens": int(batch.lengths_B.sum()),
        }

    def scored(self, minibatches: list[Batch]) -> None:
        """Take the trainer's own log-probs and entropies."""
        entropies = torch.cat([m["old_entropies_T"][m["loss_mask_T"]] for m in minibatches])
        self._values |= {"entropy_mean": _mean(entropies), **mismatch(minibatches)}

    def updated(self, summed: Metrics, report: StepReport) -> None:
        """Take one optimizer step."""
        self._updates.append((summed, report))

    def summary(self) -> dict[str, float | int | None]:
        """Return all keys of the line but ``step`` and ``seconds``."""
        return self._values
