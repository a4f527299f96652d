"""Segment ids for ``policy_loss`` from padded token ids or entropies.

Legend: B responses (one per row), S padded length, R trained tokens.
"""

from fractions import Fraction

import torch
from torch import Tensor

from megatron_rl.algorithms.segments import TokenRun, entropy_groups, sentence_ids
from megatron_rl.data.vocabulary import Granularity, Vocabulary


def sentence_segments(
    input_ids: Tensor,
    loss_mask: Tensor,
    vocabulary: Vocabulary,
    granularity: Granularity = "subsentence",
    min_tokens: int = 1,
) -> Tensor:
    """Return the sentence or subsentence of each trained token, int64 [B, S], -1 where masked: segments of sspo.

    Args:
        input_ids: [B, S], token ids, at the positions of ``loss_mask``.
        loss_mask: [B, S] bool, True on trained tokens.
        vocabulary: made once per tokenizer with ``Vocabulary.from_tokenizer(tokenizer, vocab_size)``.
        granularity: ``sentence``, or ``subsentence``, which also ends a segment at commas, semicolons and colons.
        min_tokens: shorter segments are merged into the next one.
    """
    mask_BS = loss_mask.bool().cpu()
    positions_R = mask_BS.flatten().nonzero().squeeze(1)
    run = TokenRun(input_ids.cpu()[mask_BS], positions_R, _rows(mask_BS))
    return _padded(sentence_ids(run, vocabulary, granularity, min_tokens), loss_mask)


def entropy_segments(entropies: Tensor, loss_mask: Tensor, top_fraction: float = 0.2) -> Tensor:
    """Return 1 for the ``ceil(top_fraction N)`` tokens of highest entropy of each response, 0 for its other N tokens.

    The result is int64 [B, S], -1 where masked: the groups of espo, as segments for another clipped objective.

    Args:
        entropies: [B, S], entropies of the old policy in nats.
        loss_mask: [B, S] bool, True on trained tokens.
        top_fraction: share of the tokens, between 0 and 1.
    """
    mask_BS = loss_mask.bool().cpu()
    shares = [Fraction(str(top_fraction))]
    return _padded(entropy_groups(entropies.cpu()[mask_BS], _rows(mask_BS), upper_shares=shares), loss_mask)


def _rows(mask_BS: Tensor) -> Tensor:
    """Return the row of each trained token, int64 [R]."""
    return mask_BS.nonzero()[:, 0]


def _padded(ids_R: Tensor, loss_mask: Tensor) -> Tensor:
    ids_BS = torch.full(loss_mask.shape, -1, dtype=torch.int64, device=loss_mask.device)
    ids_BS[loss_mask.bool()] = ids_R.to(loss_mask.device)
    return ids_BS
