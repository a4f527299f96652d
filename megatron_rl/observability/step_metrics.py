"""One step's line of ``metrics.jsonl``: from the batch, the scores, and each update's sums.

Legend: T tokens, B responses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import zero_variance
from megatron_rl.algorithms.correction import mismatch
from megatron_rl.algorithms.loss import summary
from megatron_rl.data.types import Batch, Metrics
from megatron_rl.observability.routing_statistics import missing_routes, routing
from megatron_rl.policy.engine import StepReport

MEANS = ("ratio_mean", "clipped_fraction", "gradient_fraction", "gradient_kept", "policy_kl_mean")


class StepMetrics:
    """Gathers what a step tells, in the order in which it happens."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._values: dict[str, float | int | None] = {"weight_version": step}
        self._updates: list[tuple[dict[str, float], StepReport]] = []

    def evaluated(self, result: tuple[float, int] | None) -> None:
        """Take an accuracy and the number of prompts behind it."""
        if result is not None:
            self._values |= {"accuracy": result[0], "evaluated_prompts": result[1]}

    def sampled(self, batch: Batch, counts: Mapping[str, float | int]) -> None:
        """Take the batch as it was sampled, and what was counted on the way to it."""
        verified_B = batch["verified_B"]
        rewards = batch["rewards_B"][verified_B]
        self._values |= {
            "reward_mean": _mean(rewards),
            "reward_std": float(rewards.std(unbiased=False)) if len(rewards) else None,
            "unverified_fraction": _mean(~verified_B),
            "response_tokens_mean": _mean(batch.trainable_counts_B),
            "truncated_fraction": _mean(batch["truncated_B"]),
            "zero_variance_fraction": _mean(zero_variance(batch["rewards_B"], batch["group_ids_B"], verified_B)),
            "tokens": int(batch.lengths_B.sum()),
            **self._lags(batch),
            **counts,
        }

    def _lags(self, batch: Batch) -> dict[str, float | int | None]:
        """Return how old the tokens are; those of which the engine did not say it are left out."""
        known_T = batch["weight_versions_T"] >= 0
        versions = batch["weight_versions_T"][known_T]
        lowest_B = torch.full((len(batch),), torch.iinfo(torch.int64).max).scatter_reduce(
            0, batch.response_ids_T[known_T], versions, "amin"
        )
        highest_B = torch.full((len(batch),), -1).scatter_reduce(0, batch.response_ids_T[known_T], versions, "amax")
        return {
            "lag_mean": _mean(self.step - versions),
            "lag_max": int((self.step - versions).max()) if len(versions) else None,
            "mixed_versions_fraction": _mean(lowest_B < highest_B),
        }

    def scored(self, minibatches: list[Batch]) -> None:
        """Take the trainer's own log-probs and entropies."""
        scored = Batch.join(minibatches)
        gap = mismatch(scored)
        self._values |= {
            "entropy_mean": _mean(scored["old_entropies_T"][scored["loss_mask_T"]]),
            "mismatch_kl": gap.get("mismatch_kl"),
            "mismatch_p50": gap.get("mismatch_abs_p50"),
            "mismatch_p90": gap.get("mismatch_abs_p90"),
            "mismatch_p99": gap.get("mismatch_abs_p99"),
            "mismatch_max": gap.get("mismatch_abs_max"),
        }
        if (found := routing(scored)) is not None:
            self._values |= {"routing_differs_tokens": found.tokens, "routing_differs_layers": found.layers}
            self._values["routing_missing_tokens"] = missing_routes(scored)

    def updated(self, summed: Metrics, report: StepReport) -> None:
        """Take one optimizer step."""
        self._updates.append((summary(summed), report))

    def summary(self) -> dict[str, float | int | None]:
        """Return all keys of the line but ``step`` and ``seconds``: means over updates weigh each by its tokens."""
        updates = [update for update, _ in self._updates]
        tokens = sum(update["tokens"] for update in updates) or 1.0
        means = {
            name: sum(update[name] * update["tokens"] for update in updates) / tokens
            for name in (*MEANS, "reference_kl_mean", "correction_mean")
            if name in updates[0]
        }
        responses = sum(update["responses"] for update in updates) or 1.0
        return {
            **self._values,
            **means,
            "loss": sum(update["loss"] for update in updates) / len(updates),
            "ratio_max": max(update["ratio_max"] for update in updates),
            "first_ratio_max": updates[0]["ratio_max"],
            "segments_mean": sum(update["segments"] for update in updates) / responses,
            "grad_norm": sum(report.grad_norm for _, report in self._updates) / len(updates),
            "lr": self._updates[-1][1].lr,
        }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
