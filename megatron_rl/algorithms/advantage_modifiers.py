"""Changes of advantages and weights after the advantages of the prompt groups: ARM and unbiased pruning.

Legend: B responses, R trained tokens.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def arm(
    advantages_B: Tensor, group_ids_B: Tensor, prompt_confidence_B: Tensor, confidence_B: Tensor, alpha: float = 0.3
) -> Tensor:
    """Return A + alpha (c(q) - c(o)), float64 [B] (ARM, arXiv 2602.05281).

    Responses o that the policy is less sure of than of their prompt q get a higher advantage. Groups whose advantages
    are all 0 are left as they are. That c(q) is ``confidence`` of all tokens of the prompt is ours.

    Args:
        advantages_B: advantage of each response.
        group_ids_B: int64, the prompt group of each response.
        prompt_confidence_B: c(q) of the response's prompt.
        confidence_B: c(o) of the response.
        alpha: size of the change.
    """
    _, groups_B = torch.unique(group_ids_B, return_inverse=True)
    signals = torch.zeros(len(groups_B), dtype=torch.int64).index_add_(0, groups_B, (advantages_B != 0).long())
    changed_B = advantages_B.double() + alpha * (prompt_confidence_B.double() - confidence_B.double())
    return torch.where(signals[groups_B] > 0, changed_B, advantages_B.double())


def confidence(logprobs_R: Tensor, responses_R: Tensor, responses: int, fraction: float = 0.2) -> Tensor:
    """Return exp(mean log-prob) over the ``ceil(fraction N)`` least likely tokens of each response, float64 [B].

    It is c(o) of ARM (arXiv 2602.05281), and with ``fraction = 1`` and the tokens of the prompts c(q). A response
    without tokens has confidence 1.

    Args:
        logprobs_R: log-probabilities of the tokens in nats.
        responses_R: int64, index of the response that each token belongs to.
        responses: number of responses B.
        fraction: share of the tokens, above 0 and at most 1.
    """
    share = Fraction(str(fraction))
    means = torch.zeros(responses, dtype=torch.float64)
    for response in torch.unique(responses_R).tolist():
        values = logprobs_R[responses_R == response].double().sort().values
        means[response] = values[: math.ceil(share * len(values))].mean()
    return means.exp()


def drop_probabilities(advantages_B: Tensor, strength: float) -> Tensor:
    """Return strength (1 - |A| / max |A|): how likely pruning drops each response, float64 [B].

    The rule is ours: arXiv 2603.04135 needs any rule that is stated in advance. Without a signal all are 0.

    Args:
        advantages_B: advantage of each response.
        strength: probability for an advantage of 0, at least 0 and below 1.
    """
    sizes_B = advantages_B.double().abs()
    largest = sizes_B.max() if len(sizes_B) else sizes_B.sum()
    return torch.zeros_like(sizes_B) if largest == 0 else strength * (1 - sizes_B / largest)


def pruned_weights(drop_probabilities_B: Tensor, mask_B: Tensor) -> Tensor:
    """Return C / (1 - P) for kept responses and 0 for dropped ones, float64 [B] (unbiased pruning, arXiv 2603.04135).

    C is the expected kept fraction, the mean of 1 - P. Denominators of the loss are those before pruning, so the
    expected gradient is C times the gradient of all responses: pruning changes its size but not its direction.

    Args:
        drop_probabilities_B: P, probability with which each response was dropped, below 1.
        mask_B: bool, which responses were kept.

    Raises:
        ValueError: a probability is not in [0, 1).
    """
    shares_B = 1 - drop_probabilities_B.double()
    if not bool(((shares_B > 0) & (shares_B <= 1)).all()):
        raise ValueError(f"drop probabilities are {drop_probabilities_B.tolist()}: each must be at least 0 and below 1")
    return torch.where(mask_B, shares_B.mean() / shares_B, 0.0)
