"""Unbiased pruning (arXiv 2603.04135): drop responses at random and reweight the others.

Legend: B responses.
"""

import torch
from torch import Tensor

from megatron_rl.data.types import Batch


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


def drop_pruned(batch: Batch) -> Batch:
    """Return the outline of a mini-batch without the responses that pruning drops; their counts stay in denominators.

    If it drops all of them, one stays, with weight 0. Without ``pruning_weights_B``, the outline is returned unchanged.

    Args:
        batch: outline of a whole mini-batch; the result has ``unpruned_responses_B`` and ``unpruned_tokens_B``.
    """
    if "pruning_weights_B" not in batch:
        return batch
    remaining = (batch["pruning_weights_B"] > 0).nonzero().flatten()
    counts_B = batch.trainable_counts_B
    rest = batch.select(remaining if len(remaining) else [0])
    columns = {
        name: torch.zeros(len(rest), dtype=torch.int64) for name in ("unpruned_responses_B", "unpruned_tokens_B")
    }
    columns["unpruned_responses_B"][0], columns["unpruned_tokens_B"][0] = (counts_B > 0).sum(), counts_B.sum()
    return rest.add(columns)
