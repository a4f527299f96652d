"""The metrics of one step, computed from its batch, its log-probs, and the sums of each update.

Legend: T tokens, B responses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import zero_variance
from megatron_rl.algorithms.correction import mismatch
from megatron_rl.algorithms.loss import summary
from megatron_rl.data.step import StepReport
from megatron_rl.data.types import Batch, Metrics
from megatron_rl.observability.routing_statistics import missing_routes, routing

TOKEN_MEANS = (
    "ratio_mean",
    "clipped_fraction",
    "gradient_fraction",
    "gradient_kept",
    "policy_kl_mean",
    "reference_kl_mean",
    "correction_mean",
)
"""Metrics of an update that are means over trained tokens; the last two are not always computed."""


class StepMetrics:
    """Collects the metrics of a step in the order in which they are known."""

    def __init__(self) -> None:
        self._values: dict[str, float | int | None] = {}
        self._updates: list[tuple[dict[str, float], StepReport]] = []

    def evaluation(self, result: tuple[float, int] | None) -> None:
        """Add an accuracy and its number of prompts."""
        if result is not None:
            self._values |= {"accuracy": result[0], "evaluated_prompts": result[1]}

    def rollout(self, step: int, batch: Batch, counts: Mapping[str, float | int]) -> None:
        """Add the sampled batch, and counts that cannot be computed from it."""
        verified_B = batch["verified_B"]
        rewards = batch["rewards_B"][verified_B]
        self._values = {
            "weight_version": step,
            **self._values,
            "reward_mean": _mean(rewards),
            "reward_std": float(rewards.std(unbiased=False)) if len(rewards) else None,
            "unverified_fraction": _mean(~verified_B),
            "response_tokens_mean": _mean(batch.trainable_counts_B),
            "truncated_fraction": _mean(batch["truncated_B"]),
            "zero_variance_fraction": _mean(zero_variance(batch["rewards_B"], batch["group_ids_B"], verified_B)),
            "tokens": int(batch.lengths_B.sum()),
            **_lags(step, batch),
            **counts,
        }

    def logprobs(self, batch: Batch) -> None:
        """Add the entropy of the old policy, and its differences from the rollout engine."""
        difference = mismatch(batch)
        self._values |= {
            "entropy_mean": _mean(batch["old_entropies_T"][batch["loss_mask_T"]]),
            "mismatch_kl": difference.get("mismatch_kl"),
            "mismatch_p50": difference.get("mismatch_abs_p50"),
            "mismatch_p90": difference.get("mismatch_abs_p90"),
            "mismatch_p99": difference.get("mismatch_abs_p99"),
            "mismatch_max": difference.get("mismatch_abs_max"),
        }
        if (found := routing(batch)) is not None:
            self._values |= {"routing_differs_tokens": found.tokens, "routing_differs_layers": found.layers}
            self._values["routing_missing_tokens"] = missing_routes(batch)

    def update(self, metrics: Metrics, report: StepReport) -> None:
        """Add one optimizer step."""
        self._updates.append((summary(metrics), report))

    def summary(self) -> dict[str, float | int | None]:
        """Return all metrics but ``step`` and ``seconds``; means over tokens weigh each update by its tokens."""
        if not self._updates:
            return self._values
        updates = [update for update, _ in self._updates]
        tokens = sum(update["tokens"] for update in updates) or 1.0
        responses = sum(update["responses"] for update in updates) or 1.0
        means = {
            name: sum(update[name] * update["tokens"] for update in updates) / tokens
            for name in TOKEN_MEANS
            if name in updates[0]
        }
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


def _lags(step: int, batch: Batch) -> dict[str, float | int | None]:
    """Return how many versions the tokens are behind their step, without tokens of unknown version."""
    known_T = batch["weight_versions_T"] >= 0
    versions = batch["weight_versions_T"][known_T]
    lowest_B = torch.full((len(batch),), torch.iinfo(torch.int64).max).scatter_reduce(
        0, batch.response_ids_T[known_T], versions, "amin"
    )
    highest_B = torch.full((len(batch),), -1).scatter_reduce(0, batch.response_ids_T[known_T], versions, "amax")
    return {
        "lag_mean": _mean(step - versions),
        "lag_max": int((step - versions).max()) if len(versions) else None,
        "mixed_versions_fraction": _mean(lowest_B < highest_B),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
