"""The text of responses in which special tokens carry meaning, such as ``<think>`` or the tags of tool calls.

Engines leave all special tokens out of the text, so a format, an extractor or an environment would never see them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class SpecialTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that ``ResponseText`` needs."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        ...


class ResponseText:
    """Decodes responses: all special tokens are shown except those that only delimit a sequence.

    Args:
        tokenizer: tokenizer of the model.
        stop_ids: tokens that end a response. They and the tokenizer's tokens for beginning, end and padding are hidden.
    """

    def __init__(self, tokenizer: SpecialTokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        self._hidden = {*stop_ids, *(getattr(tokenizer, name, None) for name in names)}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._shown = np.array(
            sorted(i for i, token in added.items() if token.special and i not in self._hidden), np.int32
        )

    def decode(self, output_ids: np.ndarray) -> str:
        """Return the text of output tokens."""
        if not self.shows(output_ids):
            return self._tokenizer.decode(output_ids.tolist(), skip_special_tokens=True)
        return self._tokenizer.decode([i for i in output_ids.tolist() if i not in self._hidden])

    def shows(self, output_ids: np.ndarray) -> bool:
        """Return whether the text has special tokens that an engine leaves out."""
        return bool(len(self._shown)) and bool(np.isin(output_ids, self._shown).any())
