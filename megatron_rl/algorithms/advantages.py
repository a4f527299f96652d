"""Advantages computed from rewards, relative to the other responses of the same prompt group.

Legend: B responses, M rewards of one response.

All functions take ``rewards_B`` and ``group_ids_B``, int64 [B], the prompt group of each response. The optional
``verified_B``, bool [B], is False where the verifier returned no score: such a response gets advantage 0 and is not
counted in means and standard deviations. All computation and all results are in float64.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.config.section import Section

EPSILON = 1e-6
"""Added to every standard deviation before dividing by it."""

AdvantageKind = Literal["zscore", "dr", "rloo", "zscore_batch", "whiten", "opo", "passk", "maxrl"]


class Advantage(Section):
    """Advantage estimation."""

    kind: Literal["zscore", "dr", "rloo", "gdpo", "zscore_batch", "whiten", "opo", "passk", "maxrl"] = "zscore"
    """Per prompt: ``zscore`` (R - mean) / (std + 1e-6), ``dr`` R - mean, ``rloo`` leave-one-out baseline, ``gdpo`` the
    z-scores of several rewards, summed with ``reward.weights`` and whitened over the batch, ``zscore_batch`` as zscore
    with the std of the batch, ``whiten`` mean and std of the batch, ``opo`` a baseline weighted by length, ``passk``
    best minus second best for the best response, ``maxrl`` (R - mean) / mean."""
    whiten_over: Literal["responses", "tokens"] = "responses"
    """Whether ``gdpo`` whitens over responses or, as verl, over their trained tokens."""
    arm_alpha: Annotated[float, Field(ge=0)] = 0.0
    """ARM (arXiv 2602.05281, which takes 0.3): add arm_alpha (c(q) - c(o)) to the advantages of groups with a signal,
    c being how sure the old policy is of the prompt and of the response; 0: off. It costs a forward pass per step."""
    pruning: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Unbiased pruning (arXiv 2603.04135): probability to drop a response with advantage 0 before training, falling to
    0 at the largest |A| of the step; 0: off. The terms of the other responses are reweighted."""

    @model_validator(mode="after")
    def _whitening_is_of_gdpo(self) -> Self:
        if self.whiten_over != "responses" and self.kind != "gdpo":
            raise ValueError(
                f'whiten_over = "{self.whiten_over}" belongs to kind = "gdpo", got "{self.kind}"; leave it out'
            )
        return self


def advantages(
    kind: AdvantageKind,
    rewards_B: Tensor,
    group_ids_B: Tensor,
    verified_B: Tensor | None = None,
    tokens_B: Tensor | None = None,
) -> Tensor:
    """Return the advantages of the configured kind, float64 [B].

    Args:
        kind: name of a function of this module.
        rewards_B: reward of each response.
        group_ids_B: int64, the prompt group of each response.
        verified_B: bool, False where the verifier returned no score; None: all True.
        tokens_B: int64, trained tokens of each response; required by ``opo`` only.
    """
    if kind == "opo":
        assert tokens_B is not None, "opo weighs rewards by tokens"
        return opo(rewards_B, group_ids_B, tokens_B, verified_B)
    functions = {
        "zscore": zscore,
        "dr": dr,
        "rloo": rloo,
        "zscore_batch": zscore_batch,
        "whiten": whiten,
        "passk": passk,
        "maxrl": maxrl,
    }
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


def zscore_batch(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return (R - mean of the group) / (std of the batch + 1e-6), float64 [B] (REINFORCE++-baseline, arXiv 2501.03262).

    ``std`` is the sample standard deviation of all verified rewards of the batch, as in trl's ``scale_rewards =
    "batch"``.
    """
    centered_B = _centered(rewards_B, group_ids_B, verified_B)[0]
    return centered_B / (_deviation(rewards_B, _verified(rewards_B, verified_B).double()) + EPSILON)


def whiten(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return (R - mean) / (std + 1e-6) over the batch, without a group baseline, float64 [B] (REINFORCE++, 2501.03262).

    ``std`` is the sample standard deviation (n - 1). Groups with equal rewards have a signal: the batch mean.
    """
    return zscore(rewards_B, torch.zeros_like(group_ids_B), verified_B)


def opo(rewards_B: Tensor, group_ids_B: Tensor, tokens_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return R - sum_j N_j R_j / sum_j N_j within each prompt group, float64 [B] (OPO, arXiv 2505.23585).

    The baseline weighs rewards by length: it minimizes the variance if gradients grow like the number of tokens N.

    Args:
        rewards_B: reward of each response.
        group_ids_B: int64, the prompt group of each response.
        tokens_B: int64, trained tokens of each response.
        verified_B: bool, False where the verifier returned no score; None: all True.
    """
    valid_B = _verified(rewards_B, verified_B) & ~zero_variance(rewards_B, group_ids_B, verified_B)
    values_B, weights_B = torch.where(valid_B, rewards_B.double(), 0.0), torch.where(valid_B, tokens_B.double(), 0.0)
    baselines_B = _group_sums(values_B * weights_B, group_ids_B) / _group_sums(weights_B, group_ids_B).clamp(min=1)
    return torch.where(valid_B, values_B - baselines_B, 0.0)


def passk(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return best minus second best reward for the best response of each prompt group, 0 for the others, float64 [B].

    It rewards the gain of the group's maximum (verl's ``grpo_passk``, arXiv 2503.19595). Where several responses are
    best, and in a group of one, all advantages are 0.
    """
    advantages_B = torch.zeros(len(rewards_B), dtype=torch.float64)
    valid_B, values_B = _verified(rewards_B, verified_B), rewards_B.double()
    for group in torch.unique(group_ids_B[valid_B]).tolist():
        members = (valid_B & (group_ids_B == group)).nonzero().squeeze(1)
        if len(members) > 1:
            best, second = values_B[members].topk(2).values
            advantages_B[members[values_B[members].argmax()]] = best - second
    return advantages_B


def maxrl(rewards_B: Tensor, group_ids_B: Tensor, verified_B: Tensor | None = None) -> Tensor:
    """Return (R - mean) / mean within each prompt group, 0 where the mean is 0, float64 [B] (prime-rl's ``max_rl``).

    A hard prompt, with a small mean, weighs more. Rewards should not be negative: a negative mean flips the sign.
    """
    centered_B, counts_B, _ = _centered(rewards_B, group_ids_B, verified_B)
    values_B = torch.where(_verified(rewards_B, verified_B), rewards_B.double(), 0.0)
    means_B = _group_sums(values_B, group_ids_B) / counts_B.clamp(min=1)
    return torch.where(means_B == 0, 0.0, centered_B / torch.where(means_B == 0, 1.0, means_B))


def gdpo(
    rewards_BM: Tensor,
    group_ids_B: Tensor,
    weights_M: Tensor | None = None,
    verified_B: Tensor | None = None,
    tokens_B: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of per-reward z-scores, whitened over the batch, float64 [B] (GDPO, arXiv 2601.05242).

    Args:
        rewards_BM: rewards, one column per kind of reward.
        group_ids_B: int64, the prompt group of each response.
        weights_M: weight of each kind of reward; None: all 1.
        verified_B: bool, False where the verifier returned no score; None: all True.
        tokens_B: int64, trained tokens of each response, to whiten over tokens as verl does; None: over responses.
    """
    scores_BM = torch.stack([zscore(rewards_B, group_ids_B, verified_B) for rewards_B in rewards_BM.unbind(1)], 1)
    sums_B = scores_BM.sum(1) if weights_M is None else scores_BM @ weights_M.double()
    if tokens_B is None:
        whitened_B = zscore(sums_B, torch.zeros_like(group_ids_B), verified_B)
    else:
        counts_B = torch.where(_verified(sums_B, verified_B), tokens_B.double(), 0.0)
        mean = (sums_B * counts_B).sum() / counts_B.sum().clamp(min=1)
        whitened_B = (sums_B - mean) / (_deviation(sums_B, counts_B) + EPSILON)
    # Groups whose z-scores are all 0, and unverified responses, must stay at exactly 0.
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


def _group_sums(values_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Return the sum of the values over each response's group, float64 [B]."""
    unique, groups_B = torch.unique(group_ids_B, return_inverse=True)
    return torch.zeros(len(unique), dtype=torch.float64).index_add_(0, groups_B, values_B.double())[groups_B]


def _deviation(values_B: Tensor, counts_B: Tensor) -> Tensor:
    """Return the sample standard deviation (n - 1) of values that occur ``counts_B`` times each, float64 scalar."""
    count, values_B = counts_B.sum(), torch.where(counts_B > 0, values_B.double(), 0.0)
    mean = (values_B * counts_B).sum() / count.clamp(min=1)
    return (((values_B - mean).square() * counts_B).sum() / (count - 1).clamp(min=1)).sqrt()
