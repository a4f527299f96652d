"""Text properties of the tokens of a vocabulary, as lookup tables that are used to find sentence boundaries.

Legend: V vocabulary of the model, before any padding for tensor parallelism.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Granularity = Literal["sentence", "subsentence"]

DELIMITERS: dict[Granularity, str] = {
    "sentence": ".!?\u3002\uff0e\uff61\uff01\uff1f",
    "subsentence": ".!?\u3002\uff0e\uff61\uff01\uff1f,;:\uff0c\u3001\uff64\uff1b\uff1a",
}
"""Characters that end a segment of each granularity, with their CJK forms. A newline ends both."""
CLOSERS = " \t\r\f\v\u00a0\u3000\"')]}>\u2019\u201d\u00bb\u203a\uff09\uff3d\uff5d\u3015\u3011\u3009\u300b\u300d\u300f"
"""Spaces, closing quotes and brackets, which may follow a delimiter within a token."""

CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""Continuation bytes of UTF-8, which are never the first byte of a character."""


@dataclass(frozen=True)
class Boundaries:
    """Boolean tables over the vocabulary, [V] each.

    Attributes:
        closes_V: the token ends in a delimiter (after stripping ``CLOSERS`` from the right) or contains a newline.
        digit_before_V: the token ends in a digit followed by ``.`` or ``,``.
        bare_V: the token is a single ``.`` or ``,``.
        starts_with_digit_V: the first character is a digit.
        ends_in_digit_V: the last character is a digit.
        continues_V: the first byte continues a UTF-8 character, so the text depends on the tokens before it.
        ends_sequence_V: the token is an end-of-sequence token.
    """

    closes_V: Tensor
    digit_before_V: Tensor
    bare_V: Tensor
    starts_with_digit_V: Tensor
    ends_in_digit_V: Tensor
    continues_V: Tensor
    ends_sequence_V: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model and their text as UTF-8 bytes.

    Attributes:
        size: number of token ids of the model's output distribution (V of log V).
        pieces: UTF-8 bytes of each token, possibly part of a character; empty for control tokens. May be shorter than
            ``size``, because many models have unused token ids.
        end_ids: ids of the tokens that end a sequence.
    """

    size: int
    pieces: Sequence[bytes] = field(default=(), repr=False)
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", size: int, end_ids: Iterable[int] = ()
    ) -> "Vocabulary":
        """Return the vocabulary of a Hugging Face tokenizer for a model with ``size`` token ids.

        Args:
            tokenizer: byte-level BPE, or one with byte fallback (SentencePiece).
            size: ``vocab_size`` of the model's config.json, which may be larger than that of the tokenizer.
            end_ids: ids of tokens that end a sequence, in addition to the tokenizer's end-of-sequence token.
        """
        eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(size, token_bytes(tokenizer), frozenset([*eos_ids, *end_ids]))

    def boundaries(self, granularity: Granularity) -> Boundaries:
        """Return the lookup tables for sentences or subsentences."""
        return self._sentence if granularity == "sentence" else self._subsentence

    def closes(self, token_ids: Sequence[int], granularity: Granularity) -> bool:
        """Return whether the last of these tokens ends a segment, decoded together with the tokens before it."""
        earlier = b"".join(self.pieces[i] for i in token_ids[:-1])
        lead = len(earlier.rstrip(CONTINUATION_BYTES)) - 1
        partial = earlier[lead:] if lead >= 0 and earlier[lead] >= 0xC0 else b""
        text = (partial + self.pieces[token_ids[-1]]).decode("utf-8", "replace")
        return _closes(text, DELIMITERS[granularity])

    @cached_property
    def _sentence(self) -> Boundaries:
        return self._tables("sentence")

    @cached_property
    def _subsentence(self) -> Boundaries:
        return self._tables("subsentence")

    def _tables(self, granularity: Granularity) -> Boundaries:
        texts = [piece.decode("utf-8", "replace") for piece in self.pieces]
        delimiters = DELIMITERS[granularity]
        return Boundaries(
            closes_V=self._table(_closes(text, delimiters) for text in texts),
            digit_before_V=self._table(text[-1:] in (".", ",") and text[-2:-1].isdecimal() for text in texts),
            bare_V=self._table(text in (".", ",") for text in texts),
            starts_with_digit_V=self._table(text[:1].isdecimal() for text in texts),
            ends_in_digit_V=self._table(text[-1:].isdecimal() for text in texts),
            continues_V=self._table(piece != b"" and piece[0] in CONTINUATION_BYTES for piece in self.pieces),
            ends_sequence_V=self._table(token_id in self.end_ids for token_id in range(self.size)),
        )

    def _table(self, flags: Iterable[bool]) -> Tensor:
        table_V = torch.zeros(max(self.size, len(self.pieces)), dtype=torch.bool)
        values = torch.tensor(list(flags), dtype=torch.bool)
        table_V[: len(values)] = values
        return table_V


def _closes(text: str, delimiters: str) -> bool:
    stripped = text.rstrip(CLOSERS)
    return "\n" in text or (stripped != "" and stripped[-1] in delimiters)


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> tuple[bytes, ...]:
    """Return the UTF-8 bytes of each token id, empty for special tokens and for ids without a token."""
    tokens = tokenizer.get_vocab()
    pieces = [b""] * (max(tokens.values()) + 1)
    kinds = _decoder_kinds(tokenizer)
    for token, token_id in tokens.items():
        if "ByteLevel" in kinds:
            # Added tokens are stored as plain text and may contain characters outside the byte alphabet.
            pieces[token_id] = b"".join(_byte_of().get(c, c.encode()) for c in token)
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            pieces[token_id] = bytes([int(token[3:5], 16)])
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            pieces[token_id] = token.replace("\u2581", " ").encode()
        else:
            pieces[token_id] = tokenizer.decode([token_id]).encode()
    for token_id, added in tokenizer.added_tokens_decoder.items():
        pieces[token_id] = b"" if added.special else added.content.encode()
    return tuple(pieces)


def _decoder_kinds(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Return the decoder types of a fast tokenizer, such as {"ByteLevel"}; empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


@cache
def _byte_of() -> dict[str, bytes]:
    """Return the byte that each character of the byte-level BPE alphabet represents (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
