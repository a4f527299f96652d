"""``mismatch.json`` and the verdict line: the worst tokens and samples of the newest step, by name and text."""

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
from megatron_rl.observability.mismatch_causes import Diagnosis, Settings, diagnose, log_gap
from megatron_rl.observability.routing_statistics import routing
from megatron_rl.tasks import Tokenizer
from megatron_rl.util.atomic import replace_text

WORST = 20
"""Tokens, and samples, that are listed."""

CONTEXT = 12
"""Tokens before a listed one that are shown with it."""

REENCODED, REENCODED_TOKENS = 64, 1 << 15
"""Responses of a step whose text is tokenised again, and how many tokens they may have together: it takes time."""


class Codec(Tokenizer, Protocol):
    """The part of a Hugging Face tokenizer that turns tokens into text and back."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True)
class Sample:
    """A response as the witness lists it: where its tokens stand, and who said what about them."""

    response: Response
    prompt_id: str


class MismatchReport:
    """Compares, step by step, what engine and trainer say about the same tokens; the main rank has one."""

    def __init__(self, run: Run, codec: Codec) -> None:
        self.settings, self.codec = Settings.of(run), codec
        self.file = Path(run.log.path) / MISMATCH
        self._cause: str | None = None

    def compare(self, step: int, groups: Sequence[Group], batch: Batch) -> str | None:
        """Write ``mismatch.json``; return the verdict if its cause is another than at the last step."""
        found = diagnose(batch, step, self.settings, routing(batch))
        if found is None:
            return None
        samples = [Sample(response, group.prompt.id) for group in groups for response in group.responses]
        replace_text(self.file, json.dumps(_clean(self.record(step, found, samples, batch)), indent=2) + "\n")
        changed, self._cause = found.cause != self._cause, found.cause
        return found.verdict if changed else None

    def record(self, step: int, found: Diagnosis, samples: Sequence[Sample], batch: Batch) -> dict[str, object]:
        """Return the contents of ``mismatch.json``."""
        responses = [sample.response for sample in samples]
        return {
            "step": step,
            "cause": found.cause,
            "verdict": found.verdict,
            "gap": found.gap,
            "causes": {**found.causes, "tokenisation": retokenised(_some(responses), self.codec)},
            "worst_tokens": worst_tokens(batch, samples, self.codec),
            "worst_samples": worst_samples(batch, samples),
        }


def worst_tokens(batch: Batch, samples: Sequence[Sample], codec: Codec) -> list[dict[str, object]]:
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
                "text": codec.decode([ids[position]]),
                "before": codec.decode(list(ids[max(0, position - CONTEXT) : position])),
                "rollout_logprob": float(batch["rollout_logprobs_T"][token]),
                "trainer_logprob": float(batch["old_logprobs_T"][token]),
                "weight_version": int(batch["weight_versions_T"][token]),
            }
        )
    return listed


def worst_samples(batch: Batch, samples: Sequence[Sample]) -> list[dict[str, object]]:
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
    """Return the absolute gap of each trained token, what is not a number as infinite."""
    return log_gap(batch).abs().nan_to_num(nan=torch.inf)


def retokenised(responses: Sequence[Response], codec: Codec) -> dict[str, object]:
    """Return how many responses have other token ids when their text is tokenised again.

    It does no harm here, where ids are never made from text again, but it does to anyone who scores text.
    """
    other = []
    for response in responses:
        ids = list(response.output_ids)
        if codec.encode(codec.decode(ids), add_special_tokens=False) != ids:
            other.append(response.id)
    return {"responses": len(responses), "other_ids": len(other), "samples": other[:WORST]}


def _some(responses: Sequence[Response]) -> list[Response]:
    """Return the first responses, as many as are tokenised again."""
    ends = accumulate(len(response.output_ids) for response in responses[:REENCODED])
    return [response for response, end in zip(responses, ends, strict=False) if end <= REENCODED_TOKENS]


def _clean(value: object) -> object:
    """Return the value for JSON, which has no NaN and no infinity: those become null."""
    if isinstance(value, Mapping):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
