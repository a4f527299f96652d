"""Sentence and subsentence ratios (SSPO, arXiv 2511.04256), with a clip window scaled by the segment's entropy.

This is a reconstruction: the paper's delimiters, length normalization and bound formula were not available to us. It
uses the delimiters of ``Vocabulary``, the geometric mean, and eps_g = eps0 * clamp(mean_{t in g} H_t / H_ref, 0.5, 2).
LPO (Ling 2.0, arXiv 2510.22115) is ``granularity = "sentence"``, ``entropy_scale = "none"``, ``aggregation = "token"``.
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_rl.algorithms.objectives.base import FixedWindow, NonNegative, Positive, Tokens
from megatron_rl.algorithms.segments import TokenRun, log_size, segment_means, sentence_ids
from megatron_rl.data.vocabulary import Granularity, Vocabulary
from megatron_rl.errors import ConfigError


class SSPO(FixedWindow):
    """Clip the geometric mean of a sentence's token ratios."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["sspo"] = "sspo"
    clip_low: NonNegative = 0.03
    """eps0 below 1. Not used with ``entropy_scale = "log_vocab"``."""
    clip_high: NonNegative = 0.03
    """eps0 above 1. Not used with ``entropy_scale = "log_vocab"``."""
    granularity: Granularity = "subsentence"
    """``subsentence`` also ends a segment at commas, semicolons and colons."""
    min_tokens: Annotated[int, Field(ge=1)] = 1
    """Shorter segments are merged into the next one."""
    entropy_scale: Literal["relative", "none", "log_vocab"] = "relative"
    """``relative``: eps0 * clamp(mean H / reference); ``none``: eps0; ``log_vocab``: alpha * mean H / log V."""
    entropy_reference: Positive | None = None
    """Reference in nats for ``relative``; none: the token mean of the global mini-batch."""
    scale_min: NonNegative = 0.5
    """Smallest factor that ``relative`` applies."""
    scale_max: NonNegative = 2.0
    """Largest factor that ``relative`` applies."""
    alpha: NonNegative = 0.02
    """Width of the ``log_vocab`` window."""

    @model_validator(mode="after")
    def _scales_are_ordered(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min = {self.scale_min} exceeds scale_max = {self.scale_max}: swap them")
        return self

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return the sentence or subsentence of each trained token, int64 [R]."""
        if vocabulary is None or not vocabulary.pieces:
            raise ConfigError("sspo needs a tokenizer to find sentences: pass segment_ids, or a Vocabulary with pieces")
        run = TokenRun(tokens["input_ids_T"], tokens.positions_R, tokens.responses_R)
        return sentence_ids(run, vocabulary, self.granularity, self.min_tokens)

    def window(
        self, tokens: Tokens, vocabulary: Vocabulary | None, segment_ids_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (low, high) of each token's segment, [R] each: wider where the old policy's mean entropy is higher."""
        if self.entropy_scale == "none":
            return super().window(tokens, vocabulary, segment_ids_R)
        assert segment_ids_R is not None, "sspo always has segments"
        entropies_R = tokens.entropies_R.double()
        means_R = segment_means(entropies_R, segment_ids_R)[0]
        if self.entropy_scale == "log_vocab":
            window_R = (self.alpha / log_size(vocabulary) * means_R).clamp(min=0)
            return window_R, window_R
        reference = self.entropy_reference or tokens.mean(entropies_R)
        # If all entropies are 0, the window of every segment is eps0.
        relative_R = means_R / reference if reference > 0 else torch.ones_like(means_R)
        scale_R = relative_R.clamp(self.scale_min, self.scale_max)
        return self.clip_low * scale_R, self.clip_high * scale_R
