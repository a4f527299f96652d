"""``tokens.jsonl``: how often segments were clipped by length and entropy, and some responses token by token.

Pure functions on trained mini-batches: their columns are whole again, so no layout can change what is written.
Legend: T tokens of the mini-batch, R trained ones, S segments, N tokens of one response.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.data.types import Batch, Group, dense_ids

TOKENS_PER_STEP = 4096
"""Tokens of all written responses of a step together; longer responses are cut, their segments are not."""

ENTROPY_EDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Borders between the bins of a segment's mean entropy, nats."""

LENGTH_EDGES = tuple(2**power for power in range(11))
"""The largest segments of each bin, tokens; longer ones have a bin of their own."""

DIGITS = 6
"""Significant digits of every number written."""


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True)
class Segments:
    """The segments of a mini-batch.

    Attributes:
        ids_R: the segment of each trained token, from 0.
        sizes_S: tokens.
        ratios_S: the importance ratio, a geometric mean over the tokens where they have ratios of their own.
        entropies_S: mean entropy of the old policy, nats.
        clipped_S: share of its tokens without a gradient because of the clip; 0 or 1 if the ratio alone decides.
        windows_S: (low, high): how far below and above 1 the ratio may go; None for objectives without a window.
    """

    ids_R: Tensor
    sizes_S: Tensor
    ratios_S: Tensor
    entropies_S: Tensor
    clipped_S: Tensor
    windows_S: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, batch: Batch) -> "Segments":
        """Return those of a mini-batch with the columns of ``make_loss(..., keep_tokens=True)``."""
        trained_R = batch.trained_R
        count = len(trained_R)
        ids_R = torch.arange(count)
        if "segment_ids_T" in batch:
            ids_R, count = dense_ids(batch["segment_ids_T"][trained_R])
        sizes_S = torch.bincount(ids_R, minlength=count)

        def mean(name: str) -> Tensor:
            sums_S = torch.zeros(count, dtype=torch.float64)
            return sums_S.index_add_(0, ids_R, batch[name][trained_R].double()) / sizes_S

        windows = (mean("clip_low_T"), mean("clip_high_T")) if "clip_low_T" in batch else None
        return cls(ids_R, sizes_S, mean("log_ratios_T").exp(), mean("old_entropies_T"), mean("clipped_T"), windows)


class TokenRecord:
    """Gathers the trained mini-batches of a step; the main rank has one."""

    def __init__(self, count: int, decoder: Decoder, clipped_word: str = "clipped") -> None:
        self._count, self._decoder = count, decoder
        self._words = {} if clipped_word == "clipped" else {"clipped_word": clipped_word}
        self._trained: list[tuple[Batch, Segments]] = []

    @property
    def updates(self) -> int:
        """Mini-batches of the step so far."""
        return len(self._trained)

    def add(self, trained: Batch) -> None:
        """Take a mini-batch with its columns before and after the update."""
        self._trained.append((trained, Segments.of(trained)))

    def take(self, step: int, groups: Sequence[Group]) -> dict[str, object]:
        """Return the line of a step and begin the next: clips of all updates, responses of the last one."""
        batch, segments = self._trained[-1]
        updates = [found for _, found in self._trained]
        self._trained.clear()
        responses = chosen(batch, self._count)
        return {
            "step": step,
            "updates": len(updates),
            **self._words,
            "by_length": by_length(updates),
            "by_entropy": by_entropy(updates),
            "samples": [self._sample(batch, segments, owner, groups) for owner in responses],
        }

    def _sample(self, batch: Batch, segments: Segments, owner: int, groups: Sequence[Group]) -> dict[str, object]:
        flat = [(group.prompt, response) for group in groups for response in group.responses]
        prompt, response = flat[int(batch["sample_index_B"][owner])]
        return {
            "id": response.id,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "reward": float(batch["rewards_B"][owner]) if bool(batch["verified_B"][owner]) else None,
            "advantage": _rounded(float(batch["advantages_B"][owner])),
            **tokens_of(batch, segments, owner, max(TOKENS_PER_STEP // self._count, 1), self._decoder),
        }


def chosen(batch: Batch, count: int) -> list[int]:
    """Return responses to be written: half of them with A > 0 and half with A < 0 if there are as many, the first."""
    counts_B, advantages_B = batch.trainable_counts_B, batch["advantages_B"]
    trained = [owner for owner in range(len(batch)) if counts_B[owner] > 0]
    rises = [owner for owner in trained if advantages_B[owner] > 0]
    falls = [owner for owner in trained if advantages_B[owner] < 0]
    half = max(count // 2, count - len(falls))
    picked = rises[:half] + falls[: count - len(rises[:half])]
    others = [owner for owner in trained if owner not in picked]
    return (picked + others)[:count]


def tokens_of(batch: Batch, segments: Segments, owner: int, most: int, decoder: Decoder) -> dict[str, object]:
    """Return a response's columns, from its first trained token on, and the segments of what is shown, in order.

    A token that is not trained (the output of a tool) has segment -1 and no numbers.
    """
    start = batch.starts_B[owner]
    end = int(start + batch.lengths_B[owner])
    trained_R = batch.trained_R
    low, high = (int(torch.searchsorted(trained_R, border)) for border in (start, torch.tensor(end)))
    first = int(trained_R[low])
    shown = slice(first, min(end, first + most))
    ids_N = torch.full((end - first,), -1)
    ids_N[trained_R[low:high] - first] = segments.ids_R[low:high]
    ids = ids_N[:most].tolist()
    order = {segment: number for number, segment in enumerate(dict.fromkeys(i for i in ids if i >= 0))}
    columns = {"old": "old_logprobs_T", "new": "new_logprobs_T", "entropy": "old_entropies_T"}
    columns["rollout"] = "rollout_logprobs_T"
    trained = batch["loss_mask_T"][shown].tolist()
    return {
        "tokens": end - first,
        "text": token_texts(batch["input_ids_T"][shown].tolist(), decoder),
        **{
            name: [_rounded(value) if is_own else None for value, is_own in zip(values, trained, strict=True)]
            for name, values in ((name, batch[column][shown].tolist()) for name, column in columns.items())
        },
        "segment": [order.get(segment, -1) for segment in ids],
        "all_segments": len(segments.ids_R[low:high].unique()),
        "segments": _table(segments, torch.tensor(list(order), dtype=torch.int64)),
        **_partly_clipped(batch["clipped_T"][shown], segments.clipped_S[list(order)]),
    }


def _partly_clipped(clipped_N: Tensor, clipped_S: Tensor) -> dict[str, object]:
    """Return the clipped tokens where the segments do not tell which they are."""
    partly = bool(((clipped_S > 0) & (clipped_S < 1)).any())
    return {"clipped_tokens": clipped_N.nonzero().flatten().tolist()} if partly else {}


def _table(segments: Segments, chosen_S: Tensor) -> dict[str, object]:
    columns = {
        "tokens": segments.sizes_S,
        "entropy": segments.entropies_S,
        "ratio": segments.ratios_S,
        "clipped": segments.clipped_S,
    }
    if segments.windows_S is not None:
        columns["low"], columns["high"] = segments.windows_S
    return {name: [_rounded(value) for value in column[chosen_S].tolist()] for name, column in columns.items()}


def token_texts(token_ids: Sequence[int], decoder: Decoder) -> list[str]:
    """Return the text that each token adds; of a character that several tokens make, the last has it all."""
    texts: list[str] = []
    known, begun = 0, 0  # tokens[begun:known] are there for the spaces that some tokenizers drop at the start
    for end in range(1, len(token_ids) + 1):
        before = decoder.decode(list(token_ids[begun:known]))
        now = decoder.decode(list(token_ids[begun:end]))
        # A character has at most four bytes; a token that is none of a character stays what the decoder makes of it.
        if now.endswith("\ufffd") and end - known < 4 and end < len(token_ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begun, known = known, end
    return texts


def by_length(updates: Sequence[Segments]) -> dict[str, object]:
    """Return segments, and the clipped ones, in bins of their number of tokens."""
    return _binned(updates, [segments.sizes_S for segments in updates], LENGTH_EDGES)


def by_entropy(updates: Sequence[Segments]) -> dict[str, object]:
    """Return segments, and the clipped ones, in bins of their mean entropy."""
    return _binned(updates, [segments.entropies_S for segments in updates], ENTROPY_EDGES)


def _binned(updates: Sequence[Segments], values: Sequence[Tensor], edges: Sequence[float]) -> dict[str, object]:
    """Return for each bin: segments, clipped segments (partly clipped ones by their share), tokens, clipped tokens."""
    bins_S = torch.bucketize(torch.cat(list(values)).double(), torch.tensor(edges, dtype=torch.float64))
    sizes_S = torch.cat([segments.sizes_S for segments in updates]).double()
    clipped_S = torch.cat([segments.clipped_S for segments in updates])
    columns = {
        "segments": torch.ones_like(sizes_S),
        "clipped": clipped_S,
        "tokens": sizes_S,
        "clipped_tokens": clipped_S * sizes_S,
    }
    counts = {name: torch.bincount(bins_S, weights_S, len(edges) + 1) for name, weights_S in columns.items()}
    return {"edges": edges, **{name: [_rounded(value) for value in count.tolist()] for name, count in counts.items()}}


def _rounded(value: float) -> float | None:
    """Return the number with few digits; None, which JSON calls null, for one that is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
