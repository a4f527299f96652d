"""``mismatch.json``: why the log-probs of engine and trainer differ, and the worst tokens and samples of a step.

Legend: R trained tokens, B responses.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from megatron_rl.config.schema import Run
from megatron_rl.data.types import Batch, Group, Response
from megatron_rl.observability.file_names import MISMATCH
from megatron_rl.observability.mismatch_causes import Diagnosis, MismatchSettings, diagnose, log_gap
from megatron_rl.observability.routing_statistics import routing
from megatron_rl.util.atomic import replace_text

WORST = 20
"""How many tokens and how many samples are listed."""

CONTEXT = 12
"""How many tokens before a listed token are shown with it."""

MAX_RETOKENIZED, MAX_RETOKENIZED_TOKENS = 64, 1 << 15
"""Limits on the responses per step whose text is tokenized again, and on their total tokens: it takes time."""


class TextTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that turns text into tokens and tokens into text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True)
class ReportedSample:
    """A response and the id of its prompt."""

    response: Response
    prompt_id: str


class MismatchReport:
    """Compares the log-probs of engine and trainer at every step. Only the main rank has one."""

    def __init__(self, run: Run, tokenizer: TextTokenizer) -> None:
        self.settings, self.tokenizer = MismatchSettings.of(run), tokenizer
        self.file = Path(run.log.path) / MISMATCH
        self._cause: str | None = None

    def compare(self, step: int, groups: Sequence[Group], batch: Batch) -> str | None:
        """Write ``mismatch.json``; return the verdict if its cause differs from that of the previous step."""
        found = diagnose(batch, step, self.settings, routing(batch))
        if found is None:
            return None
        samples = [ReportedSample(response, group.prompt.id) for group in groups for response in group.responses]
        replace_text(self.file, json.dumps(_clean(self.record(step, found, samples, batch)), indent=2) + "\n")
        changed, self._cause = found.cause != self._cause, found.cause
        return found.verdict if changed else None

    def record(self, step: int, found: Diagnosis, samples: Sequence[ReportedSample], batch: Batch) -> dict[str, object]:
        """Return the contents of ``mismatch.json``."""
        responses = [sample.response for sample in samples]
        return {
            "step": step,
            "cause": found.cause,
            "verdict": found.verdict,
            "gap": found.gap,
            "causes": {**found.causes, "tokenisation": retokenize(_first(responses), self.tokenizer)},
            "worst_tokens": worst_tokens(batch, samples, self.tokenizer),
            "worst_samples": worst_samples(batch, samples),
        }


def worst_tokens(batch: Batch, samples: Sequence[ReportedSample], tokenizer: TextTokenizer) -> list[dict[str, object]]:
    """Return the tokens with the largest gaps, worst first; ``position`` counts output tokens from 0."""
    trained_R = batch.trained_R
    order = torch.argsort(_size(batch), descending=True, stable=True)[:WORST]
    ends_B = batch.starts_B + batch.lengths_B
    listed: list[dict[str, object]] = []
    for token in trained_R[order].tolist():
        owner = int(batch.response_ids_T[token])
        sample = samples[int(batch["sample_index_B"][owner])]
        ids = sample.response.output_ids
        position = len(ids) - (int(ends_B[owner]) - token)
        listed.append(
            {
                "sample": sample.response.id,
                "prompt_id": sample.prompt_id,
                "position": position,
                "token_id": ids[position],
                "text": tokenizer.decode([ids[position]]),
                "before": tokenizer.decode(list(ids[max(0, position - CONTEXT) : position])),
                "rollout_logprob": float(batch["rollout_logprobs_T"][token]),
                "trainer_logprob": float(batch["old_logprobs_T"][token]),
                "weight_version": int(batch["weight_versions_T"][token]),
            }
        )
    return listed


def worst_samples(batch: Batch, samples: Sequence[ReportedSample]) -> list[dict[str, object]]:
    """Return the responses with the largest mean gap, worst first."""
    owners_R = batch.response_ids_T[batch.trained_R]
    size_R, zeros_B = _size(batch), torch.zeros(len(batch), dtype=torch.float64)
    means_B = zeros_B.index_add(0, owners_R, size_R) / batch.trainable_counts_B.clamp(min=1)
    largest_B = zeros_B.scatter_reduce(0, owners_R, size_R, "amax")
    listed: list[dict[str, object]] = []
    for owner in torch.argsort(means_B, descending=True, stable=True)[:WORST].tolist():
        sample = samples[int(batch["sample_index_B"][owner])]
        listed.append(
            {
                "sample": sample.response.id,
                "prompt_id": sample.prompt_id,
                "mean": float(means_B[owner]),
                "max": float(largest_B[owner]),
                "tokens": len(sample.response.output_ids),
                "text": sample.response.text,
            }
        )
    return listed


def _size(batch: Batch) -> torch.Tensor:
    """Return the absolute gap of each trained token; NaN counts as infinite."""
    return log_gap(batch).abs().nan_to_num(nan=torch.inf)


def retokenize(responses: Sequence[Response], tokenizer: TextTokenizer) -> dict[str, object]:
    """Return how many responses have other token ids after their text is decoded and encoded again.

    The trainer is not affected, because it never tokenizes text again; a program that scores text is.
    """
    other = []
    for response in responses:
        ids = list(response.output_ids)
        if tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids:
            other.append(response.id)
    return {"responses": len(responses), "other_ids": len(other), "samples": other[:WORST]}


def _first(responses: Sequence[Response]) -> list[Response]:
    """Return the first responses within the limits of retokenization."""
    ends = accumulate(len(response.output_ids) for response in responses[:MAX_RETOKENIZED])
    return [response for response, end in zip(responses, ends, strict=False) if end <= MAX_RETOKENIZED_TOKENS]


def _clean(value: object) -> object:
    """Return the value with NaN and infinity replaced by None, because JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
