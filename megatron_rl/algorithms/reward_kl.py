"""A KL penalty in the rewards: advantages once the log-probs of the old and the reference policy are known.

Legend: B responses of this replica in a mini-batch, or of the whole step.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import AdvantageKind, advantages
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.tokens import Tokens, Total
from megatron_rl.data.minibatch import Minibatch


def penalize_rewards(
    minibatches: Sequence[Minibatch], kl: ReferenceKL, kind: AdvantageKind | Literal["gdpo"], total: Total
) -> list[Minibatch]:
    """Return the mini-batches of a step, for ``placement = "reward"`` with advantages of R - coefficient * sum_t KL_t.

    KL_t is the estimate for the old policy at each trained token (``kl.estimator``, arXiv 2203.02155). Advantages are
    computed over all mini-batches of the step, because a group's responses may be in several.

    Args:
        minibatches: this replica's parts of the mini-batches, with old and reference log-probs.
        kl: the penalty.
        kind: kind of the advantages, other than ``gdpo``.
        total: adds a tensor over the replicas.
    """
    if not kl.in_reward:
        return list(minibatches)
    assert kind != "gdpo", "the configuration refuses several rewards here"
    wholes = [minibatch.whole for minibatch in minibatches]
    penalties_B = torch.cat([_penalties(minibatch, kl, total) for minibatch in minibatches])
    rewards_B, groups_B, verified_B, tokens_B = (
        torch.cat([whole[name] for whole in wholes])
        for name in ("rewards_B", "group_ids_B", "verified_B", "trained_tokens_B")
    )
    new_B = advantages(kind, rewards_B.double() - kl.in_reward * penalties_B, groups_B, verified_B, tokens_B)
    parts = new_B.split([len(whole) for whole in wholes])
    return [m.add({"advantages_B": part[m.owned_B]}) for m, part in zip(minibatches, parts, strict=True)]


def _penalties(minibatch: Minibatch, kl: ReferenceKL, total: Total) -> Tensor:
    """Return the sum of the estimates over the tokens of each response of the whole mini-batch, float64 [B]."""
    tokens = Tokens.of(minibatch)
    old_R = tokens["old_logprobs_T"].double()
    sums_B = torch.zeros(len(minibatch.whole), dtype=torch.float64)
    sums_B.index_add_(
        0, minibatch.owned_B[tokens.responses_R], kl.cost(old_R, tokens["ref_logprobs_T"].double(), old_R)
    )
    return total(sums_B)
