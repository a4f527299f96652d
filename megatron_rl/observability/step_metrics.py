"""The metrics of one step, computed from its outline, from sums over its tokens, and the sums of each update.

Legend: B responses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import zero_variance
from megatron_rl.algorithms.loss import GATE, MEASURE, summary
from megatron_rl.data.minibatch import Minibatch, joined
from megatron_rl.data.step import StepReport
from megatron_rl.data.types import Batch, Metrics
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.observability.routing_statistics import RoutingCounts

TOKEN_MEANS = (
    "ratio_mean",
    "clipped_fraction",
    "gradient_fraction",
    "gradient_kept",
    "policy_kl_mean",
    "reference_kl_mean",
    "correction_mean",
    "entropy_coefficient",
)
"""Metrics of an update that are means over trained tokens; the last three are not always computed."""


@dataclass(frozen=True)
class MeanParts:
    """Sum and number of values over all replicas, of which ``mean`` is computed last."""

    sum: float
    count: int

    @property
    def mean(self) -> float | None:
        """The mean; None without values."""
        return self.sum / self.count if self.count else None


def entropy_parts(minibatches: Sequence[Minibatch], replicas: Replicas) -> MeanParts:
    """Return sum and number of the old policy's entropies at the trained tokens of all replicas, nats. Collective."""
    entropies_R = joined(minibatches, "old_entropies_T").double()
    total, count = replicas.sum(torch.stack([entropies_R.sum(), torch.tensor(len(entropies_R)).double()])).tolist()
    return MeanParts(total, int(count))


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
        """Add the outline of the sampled batch, and counts that cannot be computed from it."""
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
            **({"pruned_fraction": _mean(batch["pruning_weights_B"] == 0)} if "pruning_weights_B" in batch else {}),
            **_lags(step, batch),
            **counts,
        }

    def logprobs(self, entropies: MeanParts, gap: Mapping[str, float], routing: RoutingCounts | None) -> None:
        """Add the entropy of the old policy, and its differences from the rollout engine.

        Args:
            entropies: entropy of the old policy at all trained tokens, nats.
            gap: ``log_ratio_statistics`` of all trained tokens.
            routing: differences of the chosen experts; None if routes were not compared.
        """
        self._values |= {
            "entropy_mean": entropies.mean,
            "mismatch_kl": gap.get("kl"),
            "mismatch_p50": gap.get("abs_p50"),
            "mismatch_p90": gap.get("abs_p90"),
            "mismatch_p99": gap.get("abs_p99"),
            "mismatch_max": gap.get("abs_max"),
        }
        if routing is not None and (found := routing.differences) is not None:
            self._values |= {"routing_differs_tokens": found.tokens, "routing_differs_layers": found.layers}
            self._values["routing_missing_tokens"] = routing.missing

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
            for name in updates[0]
            if name in TOKEN_MEANS or name.startswith((MEASURE, GATE))
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


def _lags(step: int, outline: Batch) -> dict[str, float | int | None]:
    """Return how many versions the tokens are behind their step, without tokens of unknown version."""
    known_B = outline["known_versions_B"]
    known, versions = int(known_B.sum()), int(outline["version_sums_B"].sum())
    oldest = outline["oldest_versions_B"][known_B > 0]
    return {
        "lag_mean": (step * known - versions) / known if known else None,
        "lag_max": step - int(oldest.min()) if known else None,
        "mixed_versions_fraction": _mean(outline["oldest_versions_B"] < outline["newest_versions_B"]),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None
