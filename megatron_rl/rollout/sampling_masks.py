"""The token ids that the engine sampled each token from, as a column of a batch.

With top-p or top-k the engine samples from a part of the vocabulary. The trainer's log-probs and entropies are then
those of the policy restricted to the same part ("keep sampling mask" of DeepSeek-V3.2, arXiv 2512.02556), so that a
ratio compares the distributions that were sampled from.

Legend: T tokens, Q ids of a token's sampling mask.
"""

from collections.abc import Sequence

import torch

from megatron_rl.data.types import Columns, Response
from megatron_rl.errors import RolloutError


def mask_columns(responses: Sequence[Response], lengths: Sequence[int]) -> Columns:
    """Return ``mask_ids_T`` [T, Q], int32, -1 as padding, on prompts and on tokens of an environment.

    Args:
        responses: the responses of the batch.
        lengths: tokens of each sequence, prompt included.

    Raises:
        RolloutError: a response has no sampling mask.
    """
    widths = [0 if response.mask_ids is None else response.mask_ids.shape[1] for response in responses]
    mask_ids_TQ = torch.full((sum(lengths), max(widths, default=0)), -1, dtype=torch.int32)
    end = 0
    for response, length in zip(responses, lengths, strict=True):
        end += length
        if response.mask_ids is None and any(response.sampled):
            raise RolloutError(
                f"rollout.sampling.keep_mask needs the ids that {response.id} was sampled from, and the server returned"
                " none; use a version of SGLang with return_sampling_mask, or set keep_mask = false"
            )
        if response.mask_ids is not None:
            mask_ids_TQ[end - len(response.mask_ids) : end, : response.mask_ids.shape[1]] = response.mask_ids
    return {"mask_ids_T": mask_ids_TQ}
