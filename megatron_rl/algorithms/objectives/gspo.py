"""Group sequence policy optimization (arXiv 2507.18071): one clipped ratio per response."""

from typing import ClassVar, Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import FixedWindow, NonNegative, Tokens
from megatron_rl.data.vocabulary import Vocabulary


class GSPO(FixedWindow):
    """Clip the geometric mean of a response's token ratios."""

    meant_for_several_updates: ClassVar[bool] = True

    name: Literal["gspo"] = "gspo"
    clip_low: NonNegative = 3e-4
    """A response with a negative advantage stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative = 4e-4
    """A response with a positive advantage stops training when its ratio rises above 1 + clip_high."""

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return the response index of each trained token, int64 [R]: every response is a segment."""
        return tokens.responses_R
