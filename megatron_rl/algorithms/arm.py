"""ARM (arXiv 2602.05281): a change of advantages by how sure the policy is of prompts and responses.

Legend: T all tokens of a mini-batch, B responses, R trained tokens.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from megatron_rl.algorithms.tokens import Tokens
from megatron_rl.data.minibatch import Minibatch


def arm_alphas(advantages_B: Tensor, group_ids_B: Tensor, verified_B: Tensor, alpha: float) -> Tensor:
    """Return ``alpha`` for verified responses of groups with an advantage that is not 0, else 0, float64 [B].

    Args:
        advantages_B: advantage of each response.
        group_ids_B: int64, the prompt group of each response.
        verified_B: bool, False where the verifier returned no score.
        alpha: size of ARM's change.
    """
    _, groups_B = torch.unique(group_ids_B, return_inverse=True)
    signals = torch.zeros(len(groups_B), dtype=torch.int64).index_add_(0, groups_B, (advantages_B != 0).long())
    return alpha * ((signals[groups_B] > 0) & verified_B).double()


def arm(advantages_B: Tensor, alphas_B: Tensor, prompt_confidence_B: Tensor, confidence_B: Tensor) -> Tensor:
    """Return A + alpha (c(q) - c(o)), float64 [B] (ARM, arXiv 2602.05281).

    Responses o that the policy is less sure of than of their prompt q get a higher advantage. That c(q) is
    ``confidence`` of all tokens of the prompt is ours.

    Args:
        advantages_B: advantage of each response.
        alphas_B: size of the change, from ``arm_alphas``.
        prompt_confidence_B: c(q) of the response's prompt.
        confidence_B: c(o) of the response.
    """
    return advantages_B.double() + alphas_B * (prompt_confidence_B.double() - confidence_B.double())


def prompts_of(minibatch: Minibatch) -> Minibatch:
    """Return the mini-batch with the tokens of its prompts as the trained ones, to compute their log-probs.

    These are the tokens before the first trained one of a response, except the first, which nothing predicts.
    """
    seen_T = minibatch["loss_mask_T"].long().cumsum(0)
    starts_B = minibatch.starts_B
    before_B = torch.cat([seen_T.new_zeros(1), seen_T])[starts_B]
    prompt_T = seen_T == before_B[minibatch.response_ids_T]
    prompt_T[starts_B[minibatch.lengths_B > 0]] = False
    return minibatch.add({"loss_mask_T": prompt_T})


def add_arm(minibatch: Minibatch, prompt_logprobs_T: Tensor) -> Minibatch:
    """Return the mini-batch with ARM's change of its advantages.

    Args:
        minibatch: with old log-probs, ``advantages_B`` and ``arm_alphas_B``.
        prompt_logprobs_T: log-probs of the old policy at the trained tokens of ``prompts_of``.
    """
    prompts, tokens = prompts_of(minibatch), Tokens.of(minibatch)
    prompt_ids_R = prompts.response_ids_T[prompts.trained_R]
    prompt_B = confidence(prompt_logprobs_T[prompts.trained_R], prompt_ids_R, len(minibatch), fraction=1)
    response_B = confidence(tokens["old_logprobs_T"], tokens.responses_R, len(minibatch))
    changed_B = arm(minibatch["advantages_B"], minibatch["arm_alphas_B"], prompt_B, response_B)
    return minibatch.add({"advantages_B": changed_B})


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
