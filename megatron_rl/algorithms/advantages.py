"""From rewards to advantages: pure functions on responses and the prompt group that each belongs to.

Legend: B responses, M rewards of one response.

``verified_B`` is False where the verifier gave no score: such a response has advantage 0 and counts in no mean and no
deviation. Everything is in float64, whatever comes in.
"""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to every standard deviation."""

AdvantageKind = Literal["zscore", "dr", "rloo"]


def advantages(kind: AdvantageKind, rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return the advantages of the kind that a configuration names, float64 [B]."""
    functions = {"zscore": zscore, "dr": dr, "rloo": rloo}
    return functions[kind](rewards_B, group_ids_B, verified_B)


def zscore(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return (R - mean) / (std + 1e-6) within each prompt group, std the sample deviation; a group of one gives 0."""
    centred_B, counts_B, dense_B = _centred(rewards_B, group_ids_B, verified_B)
    squares = torch.zeros(int(dense_B.max()) + 1 if len(dense_B) else 0, dtype=torch.float64)
    squares.index_add_(0, dense_B, centred_B.square())
    return centred_B / ((squares[dense_B] / (counts_B - 1).clamp(min=1)).sqrt() + EPSILON)


def dr(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return R - mean within each prompt group (Dr.GRPO, arXiv 2503.20783)."""
    return _centred(rewards_B, group_ids_B, verified_B)[0]


def rloo(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return R minus the mean of the group's other responses (leave one out); a group of one gives 0."""
    centred_B, counts_B, _ = _centred(rewards_B, group_ids_B, verified_B)
    return centred_B * counts_B / (counts_B - 1).clamp(min=1)


def gdpo(
    rewards_BM: Tensor, group_ids_B: Tensor, weights_M: Tensor | None = None, verified_B: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of each reward's z-score, whitened over the batch (GDPO, arXiv 2601.05242).

    Args:
        rewards_BM: one column a reward.
        group_ids_B: the prompt group of each response.
        weights_M: of the rewards; none: 1 each.
        verified_B: see the module.
    """
    scores_BM = torch.stack([zscore(rewards_B, group_ids_B, verified_B) for rewards_B in rewards_BM.unbind(1)], 1)
    sums_B = scores_BM.sum(1) if weights_M is None else scores_BM @ weights_M.double()
    whitened_B = zscore(sums_B, torch.zeros_like(group_ids_B), verified_B)
    # A group that teaches nothing stays at exactly 0: the mean of the batch is 0 but for a rounding error.
    return torch.where((scores_BM != 0).any(1), whitened_B, 0.0)


def zero_variance(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return, bool [B], whether the verified rewards of a response's group are all equal: then it teaches nothing."""
    _, dense_B = torch.unique(group_ids_B, return_inverse=True)
    kept_B = _verified(rewards_B, verified_B)
    count = int(dense_B.max()) + 1 if len(dense_B) else 0
    rewards_B = rewards_B.double()
    lowest = torch.full((count,), torch.inf, dtype=torch.float64)
    lowest.scatter_reduce_(0, dense_B[kept_B], rewards_B[kept_B], "amin")
    highest = torch.full((count,), -torch.inf, dtype=torch.float64)
    highest.scatter_reduce_(0, dense_B[kept_B], rewards_B[kept_B], "amax")
    return (lowest >= highest)[dense_B]


def overlong_penalty(lengths_B: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Return DAPO's length penalty (arXiv 2503.14476, eq. 13), to be added to the reward, float64 [B].

    0 up to ``max_tokens - buffer_tokens`` response tokens, from there linear to -1 at ``max_tokens``, -1 beyond.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens = {buffer_tokens} must lie between 1 and max_tokens = {max_tokens}")
    return ((max_tokens - buffer_tokens - lengths_B.double()) / buffer_tokens).clamp(-1, 0)


def _verified(rewards_B: Tensor, verified_B: Tensor | None) -> Tensor:
    return torch.ones(len(rewards_B), dtype=torch.bool) if verified_B is None else verified_B.bool()


def _centred(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return R - mean over the group's verified responses (exactly 0 where all are equal), their number, dense ids."""
    unique, dense_B = torch.unique(group_ids_B, return_inverse=True)
    kept_B = _verified(rewards_B, verified_B)
    values_B = torch.where(kept_B, rewards_B.double(), 0.0)
    counts = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, dense_B, kept_B.double())
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, dense_B, values_B)
    means_B = (sums / counts.clamp(min=1))[dense_B]
    # A mean of equal numbers is off by a rounding error, which 1 / (0 + 1e-6) would blow up.
    learns_B = kept_B & ~zero_variance(rewards_B, group_ids_B, verified_B)
    return torch.where(learns_B, values_B - means_B, 0.0), counts[dense_B], dense_B
