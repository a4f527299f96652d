"""Advantages computed from rewards, relative to the other responses of the same prompt group.

Legend: B responses, M rewards of one response.

All functions take ``rewards_B`` and ``group_ids_B``, int64 [B], the prompt group of each response. The optional
``verified_B``, bool [B], is False where the verifier returned no score: such a response gets advantage 0 and is not
counted in means and standard deviations. All computation and all results are in float64.
"""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to every standard deviation before dividing by it."""

AdvantageKind = Literal["zscore", "dr", "rloo"]


def advantages(kind: AdvantageKind, rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return the advantages of the configured kind, float64 [B]."""
    functions = {"zscore": zscore, "dr": dr, "rloo": rloo}
    return functions[kind](rewards_B, group_ids_B, verified_B)


def zscore(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return (R - mean) / (std + 1e-6) within each prompt group, float64 [B] (GRPO, arXiv 2402.03300).

    ``std`` is the sample standard deviation (n - 1). A group with one response gets advantage 0.
    """
    centered_B, counts_B, groups_B = _centered(rewards_B, group_ids_B, verified_B)
    squares = torch.zeros(int(groups_B.max()) + 1 if len(groups_B) else 0, dtype=torch.float64)
    squares.index_add_(0, groups_B, centered_B.square())
    return centered_B / ((squares[groups_B] / (counts_B - 1).clamp(min=1)).sqrt() + EPSILON)


def dr(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return R - mean within each prompt group, float64 [B] (Dr.GRPO, arXiv 2503.20783)."""
    return _centered(rewards_B, group_ids_B, verified_B)[0]


def rloo(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return R minus the mean reward of the group's other responses, float64 [B] (RLOO, arXiv 2402.14740).

    A group with one response gets advantage 0.
    """
    centered_B, counts_B, _ = _centered(rewards_B, group_ids_B, verified_B)
    return centered_B * counts_B / (counts_B - 1).clamp(min=1)


def gdpo(
    rewards_BM: Tensor, group_ids_B: Tensor, weights_M: Tensor | None = None, verified_B: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of per-reward z-scores, whitened over the batch, float64 [B] (GDPO, arXiv 2601.05242).

    Args:
        rewards_BM: rewards, one column per kind of reward.
        group_ids_B: int64, the prompt group of each response.
        weights_M: weight of each kind of reward; None: all 1.
        verified_B: bool, False where the verifier returned no score; None: all True.
    """
    scores_BM = torch.stack([zscore(rewards_B, group_ids_B, verified_B) for rewards_B in rewards_BM.unbind(1)], 1)
    sums_B = scores_BM.sum(1) if weights_M is None else scores_BM @ weights_M.double()
    whitened_B = zscore(sums_B, torch.zeros_like(group_ids_B), verified_B)
    # The batch mean is 0 up to rounding; groups whose z-scores are all 0 must stay at exactly 0.
    return torch.where((scores_BM != 0).any(1), whitened_B, 0.0)


def zero_variance(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return, bool [B], whether all verified rewards of a response's group are equal, so that its advantages are 0."""
    _, groups_B = torch.unique(group_ids_B, return_inverse=True)
    valid_B = _verified(rewards_B, verified_B)
    count = int(groups_B.max()) + 1 if len(groups_B) else 0
    rewards_B = rewards_B.double()
    lowest = torch.full((count,), torch.inf, dtype=torch.float64)
    lowest.scatter_reduce_(0, groups_B[valid_B], rewards_B[valid_B], "amin")
    highest = torch.full((count,), -torch.inf, dtype=torch.float64)
    highest.scatter_reduce_(0, groups_B[valid_B], rewards_B[valid_B], "amax")
    return (lowest >= highest)[groups_B]


def overlong_penalty(lengths_B: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Return DAPO's overlong penalty, to be added to the reward, float64 [B] (arXiv 2503.14476, eq. 13).

    The penalty is 0 up to ``max_tokens - buffer_tokens`` response tokens, decreases linearly to -1 at ``max_tokens``
    and stays at -1 beyond.

    Args:
        lengths_B: response length in tokens.
        max_tokens: length from which the penalty is -1.
        buffer_tokens: length of the interval over which the penalty decreases.

    Raises:
        ValueError: ``buffer_tokens`` is not between 1 and ``max_tokens``.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens = {buffer_tokens} must be between 1 and max_tokens = {max_tokens}")
    return ((max_tokens - buffer_tokens - lengths_B.double()) / buffer_tokens).clamp(-1, 0)


def _verified(rewards_B: Tensor, verified_B: Tensor | None) -> Tensor:
    return torch.ones(len(rewards_B), dtype=torch.bool) if verified_B is None else verified_B.bool()


def _centered(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return R - mean over the group's verified responses (exactly 0 where all are equal) and two tensors of its group.

    Those are, for each response, the number of verified responses of the group and the group's index from 0.
    """
    unique, groups_B = torch.unique(group_ids_B, return_inverse=True)
    valid_B = _verified(rewards_B, verified_B)
    values_B = torch.where(valid_B, rewards_B.double(), 0.0)
    counts = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, groups_B, valid_B.double())
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, groups_B, values_B)
    means_B = (sums / counts.clamp(min=1))[groups_B]
    # The mean of equal numbers has a rounding error, which dividing by 0 + 1e-6 would amplify.
    varies_B = valid_B & ~zero_variance(rewards_B, group_ids_B, verified_B)
    return torch.where(varies_B, values_B - means_B, 0.0), counts[groups_B], groups_B
