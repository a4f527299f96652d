"""``tokens.jsonl``: counts of clipped segments by length and entropy, and some responses token by token.

Pure functions on this replica's part of a mini-batch after its update, whose columns cover all tokens of its responses,
so the layout within the replica does not matter. Legend: T tokens of this replica's part, R trained tokens, G segments,
N tokens of one response.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megatron_rl.data.minibatch import Minibatch
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch, dense_ids
from megatron_rl.distributed.replicas import Replicas

TOKENS_PER_STEP = 4096
"""Largest total of tokens written per step; longer responses are cut, but their segments are counted whole."""

ENTROPY_EDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Boundaries of the bins of a segment's mean entropy, nats."""

LENGTH_EDGES = tuple(2**power for power in range(11))
"""Upper bounds of the bins of a segment's length, tokens; a last bin has all longer segments."""

DIGITS = 6
"""Significant digits of the numbers in the file."""


class TokenDecoder(Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True)
class SegmentTable:
    """The segments of a mini-batch.

    Attributes:
        ids_R: index of the segment of each trained token.
        sizes_G: number of tokens.
        ratios_G: importance ratio; the geometric mean over the tokens if each has its own ratio.
        entropies_G: mean entropy under the old policy, nats.
        clipped_G: fraction of its tokens without a gradient because of the clip; 0 or 1 if only the ratio decides.
        windows_G: (low, high): how far the ratio may be below and above 1; None for objectives without a window.
    """

    ids_R: Tensor
    sizes_G: Tensor
    ratios_G: Tensor
    entropies_G: Tensor
    clipped_G: Tensor
    windows_G: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, batch: Batch) -> "SegmentTable":
        """Return the segments of a mini-batch with the columns of ``make_loss(..., keep_tokens=True)``."""
        trained_R = batch.trained_R
        count = len(trained_R)
        ids_R = torch.arange(count)
        if "segment_ids_T" in batch:
            ids_R, count = dense_ids(batch["segment_ids_T"][trained_R])
        sizes_G = torch.bincount(ids_R, minlength=count)

        def mean(name: str) -> Tensor:
            sums_G = torch.zeros(count, dtype=torch.float64)
            return sums_G.index_add_(0, ids_R, batch[name][trained_R].double()) / sizes_G

        windows = (mean("clip_low_T"), mean("clip_high_T")) if "clip_low_T" in batch else None
        return cls(ids_R, sizes_G, mean("log_ratios_T").exp(), mean("old_entropies_T"), mean("clipped_T"), windows)


class TokenRecord:
    """Collects the mini-batches of a step after their updates. The first rank of each replica has one."""

    def __init__(
        self, count: int, decoder: TokenDecoder, clipped_word: str = "clipped", replicas: Replicas | None = None
    ) -> None:
        self._count, self._decoder, self._replicas = count, decoder, replicas or Replicas()
        self._words = {} if clipped_word == "clipped" else {"clipped_word": clipped_word}
        self._trained: list[tuple[Minibatch, SegmentTable]] = []

    @property
    def updates(self) -> int:
        """Number of updates of the step so far."""
        return len(self._trained)

    def add(self, trained: Minibatch) -> None:
        """Add this replica's part of a mini-batch, with its columns before and after the update."""
        self._trained.append((trained, SegmentTable.of(trained)))

    def take(self, step: int, step_samples: StepSamples) -> dict[str, object] | None:
        """Return the line of a step: clip counts of all updates, responses of the last one. Starts the next step.

        Collective over the replicas; returns None without samples, which only the main rank has.
        """
        minibatch, segments = self._trained[-1]
        updates = [found for _, found in self._trained]
        self._trained.clear()
        tables = {"by_length": by_length(updates, self._replicas), "by_entropy": by_entropy(updates, self._replicas)}
        shown = self._replicas.gather(self._samples(minibatch, segments))
        if not step_samples.output_tokens:
            return None
        by_index = {index: sample for part in cast(list[list[list[Any]]], shown) for index, sample in part}
        written = [by_index[index] for index in chosen(minibatch.whole, self._count)]
        read = step_samples.read([sample["sample_index"] for sample in written])
        samples = [self._named(sample, recorded) for sample, recorded in zip(written, read, strict=True)]
        return {"step": step, "updates": len(updates), **self._words, **tables, "samples": samples}

    def _samples(self, minibatch: Minibatch, segments: SegmentTable) -> list[tuple[int, dict[str, object]]]:
        """Return the responses to write that this replica owns, by their index within the mini-batch."""
        owners = {index: owner for owner, index in enumerate(minibatch.owned_B.tolist())}
        found = []
        for index in chosen(minibatch.whole, self._count):
            if (owner := owners.get(index)) is not None:
                verified = bool(minibatch["verified_B"][owner])
                sample = {
                    "sample_index": int(minibatch["sample_index_B"][owner]),
                    "reward": float(minibatch["rewards_B"][owner]) if verified else None,
                    "advantage": _rounded(float(minibatch["advantages_B"][owner])),
                    **tokens_of(minibatch, segments, owner, max(TOKENS_PER_STEP // self._count, 1), self._decoder),
                }
                found.append((index, sample))
        return found

    def _named(self, sample: dict[str, object], recorded: RecordedSample) -> dict[str, object]:
        rest = {name: value for name, value in sample.items() if name != "sample_index"}
        return {"id": recorded.id, "prompt_id": recorded.prompt_id, "prompt": recorded.prompt, **rest}


def chosen(outline: Batch, count: int) -> list[int]:
    """Return the responses to write: the first with A > 0 and the first with A < 0, if possible half of each."""
    counts_B, advantages_B = outline.trainable_counts_B.tolist(), outline["advantages_B"].tolist()
    trained = [owner for owner in range(len(outline)) if counts_B[owner] > 0]
    rises = [owner for owner in trained if advantages_B[owner] > 0]
    falls = [owner for owner in trained if advantages_B[owner] < 0]
    half = max(count // 2, count - len(falls))
    picked = rises[:half] + falls[: count - len(rises[:half])]
    taken = set(picked)
    others = [owner for owner in trained if owner not in taken]
    return (picked + others)[:count]


def tokens_of(batch: Batch, segments: SegmentTable, owner: int, most: int, decoder: TokenDecoder) -> dict[str, object]:
    """Return a response's columns from its first trained token on, and the segments of the tokens shown.

    A token that is not trained, such as the output of a tool, has segment -1 and no numbers.
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
            name: [_rounded(value) if is_trained else None for value, is_trained in zip(values, trained, strict=True)]
            for name, values in ((name, batch[column][shown].tolist()) for name, column in columns.items())
        },
        "segment": [order.get(segment, -1) for segment in ids],
        "all_segments": len(segments.ids_R[low:high].unique()),
        "segments": _table(segments, torch.tensor(list(order), dtype=torch.int64)),
        **_partly_clipped(batch["clipped_T"][shown], segments.clipped_G[list(order)]),
    }


def _partly_clipped(clipped_N: Tensor, clipped_G: Tensor) -> dict[str, object]:
    """Return the indices of the clipped tokens if a segment is clipped in part."""
    partly = bool(((clipped_G > 0) & (clipped_G < 1)).any())
    return {"clipped_tokens": clipped_N.nonzero().flatten().tolist()} if partly else {}


def _table(segments: SegmentTable, chosen_G: Tensor) -> dict[str, object]:
    columns = {
        "tokens": segments.sizes_G,
        "entropy": segments.entropies_G,
        "ratio": segments.ratios_G,
        "clipped": segments.clipped_G,
    }
    if segments.windows_G is not None:
        columns["low"], columns["high"] = segments.windows_G
    return {name: [_rounded(value) for value in column[chosen_G].tolist()] for name, column in columns.items()}


def token_texts(token_ids: Sequence[int], decoder: TokenDecoder) -> list[str]:
    """Return the text that each token adds; a character made of several tokens belongs to the last of them."""
    texts: list[str] = []
    known, begun = 0, 0  # tokens[begun:known] are decoded too, because some tokenizers drop spaces at the start
    for end in range(1, len(token_ids) + 1):
        before = decoder.decode(list(token_ids[begun:known]))
        now = decoder.decode(list(token_ids[begun:end]))
        # A character has at most four bytes; a token that is not part of one keeps the decoder's replacement.
        if now.endswith("\ufffd") and end - known < 4 and end < len(token_ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        begun, known = known, end
    return texts


def by_length(updates: Sequence[SegmentTable], replicas: Replicas) -> dict[str, object]:
    """Return the number of segments and of clipped segments of all replicas, in bins of their length."""
    return _binned(updates, [segments.sizes_G for segments in updates], LENGTH_EDGES, replicas)


def by_entropy(updates: Sequence[SegmentTable], replicas: Replicas) -> dict[str, object]:
    """Return the number of segments and of clipped segments of all replicas, in bins of their mean entropy."""
    return _binned(updates, [segments.entropies_G for segments in updates], ENTROPY_EDGES, replicas)


def _binned(
    updates: Sequence[SegmentTable], values: Sequence[Tensor], edges: Sequence[float], replicas: Replicas
) -> dict[str, object]:
    """Return per bin the segments, clipped segments (a fraction if clipped in part), tokens and clipped tokens."""
    bins_G = torch.bucketize(torch.cat(list(values)).double(), torch.tensor(edges, dtype=torch.float64))
    sizes_G = torch.cat([segments.sizes_G for segments in updates]).double()
    clipped_G = torch.cat([segments.clipped_G for segments in updates])
    columns = {
        "segments": torch.ones_like(sizes_G),
        "clipped": clipped_G,
        "tokens": sizes_G,
        "clipped_tokens": clipped_G * sizes_G,
    }
    counts = replicas.sum(torch.stack([torch.bincount(bins_G, each_G, len(edges) + 1) for each_G in columns.values()]))
    rounded = [[_rounded(value) for value in count] for count in counts.tolist()]
    return {"edges": edges, **dict(zip(columns, rounded, strict=True))}


def _rounded(value: float) -> float | None:
    """Return the number with ``DIGITS`` significant digits; None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
