"""Group relative policy optimization (arXiv 2402.03300): one clipped ratio per token.

DAPO (arXiv 2503.14476) is ``clip_high = 0.28`` with ``aggregation = "token"``. Dr.GRPO (arXiv 2503.20783) is
``aggregation = "constant"`` with ``normalizer`` and ``dr`` advantages.
"""

from typing import Literal

from torch import Tensor

from megatron_rl.algorithms.objectives.base import FixedWindow, NonNegative, Tokens
from megatron_rl.data.vocabulary import Vocabulary


class GRPO(FixedWindow):
    """Clip the importance ratio of each token."""

    name: Literal["grpo"] = "grpo"
    clip_low: NonNegative = 0.2
    """A token with a negative advantage stops training when its ratio falls below 1 - clip_low."""
    clip_high: NonNegative = 0.2
    """A token with a positive advantage stops training when its ratio rises above 1 + clip_high."""

    def segments(self, tokens: Tokens, vocabulary: Vocabulary | None) -> Tensor | None:
        """Return None: every token is a segment."""
        return None
