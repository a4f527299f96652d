"""``mismatch.json``: why the log-probs of engine and trainer differ, and the worst tokens and samples of a step.

Every replica lists its own worst tokens and samples; the main rank merges the lists. Legend: R trained tokens,
B responses.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol, cast

import torch

from megatron_rl.config.schema import Run
from megatron_rl.data.minibatch import Minibatch
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch
from megatron_rl.errors import TrainingError
from megatron_rl.observability.file_names import MISMATCH
from megatron_rl.observability.mismatch_causes import (
    Diagnosis,
    EngineQuantization,
    LogprobGaps,
    MismatchSettings,
    diagnose,
    log_gap,
)
from megatron_rl.observability.routing_statistics import RoutingCounts
from megatron_rl.util.atomic import replace_text

Json = Mapping[str, object]

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


class MismatchReport:
    """Compares the log-probs of engine and trainer at every step. The first rank of each replica has one."""

    def __init__(self, run: Run, tokenizer: TextTokenizer, quantization: EngineQuantization | None = None) -> None:
        self.settings, self.tokenizer = MismatchSettings.of(run, quantization), tokenizer
        self.file = Path(run.log.path) / MISMATCH
        self.limit = run.train.mismatch_limit
        self._cause: str | None = None
        self._steps = 0

    def compare(
        self,
        step: int,
        step_samples: StepSamples,
        minibatches: Sequence[Minibatch],
        gaps: LogprobGaps,
        routing: RoutingCounts | None,
    ) -> str | None:
        """Write ``mismatch.json`` on the main rank; return the verdict if its cause differs from that of the last step.

        Args:
            step: the step, whose number is the version of the weights that computed the trainer's log-probs.
            step_samples: the samples of the step on the main rank, empty on the others.
            minibatches: this replica's parts of the step's mini-batches.
            gaps: the differences of the log-probs.
            routing: differences of the chosen experts; None if they are unknown.

        Raises:
            TrainingError: in a step after the first, the gap has no known cause and exceeds the limit.
        """
        found = diagnose(gaps, step, self.settings, None if routing is None else routing.differences)
        if found is None:
            return None
        self._steps += 1
        too_large = self._steps > 1 and self._exceeds_limit(found)
        listed = gaps.replicas.gather([worst_tokens(minibatches), worst_samples(minibatches)])
        if not step_samples.output_tokens:
            if too_large:
                raise TrainingError(self._describe_limit(step, found))
            return None
        tokens, sequences = (_merged(lists) for lists in zip(*cast(list[list[list[Json]]], listed), strict=True))
        first = _first(step_samples.output_tokens)
        indices = sorted({cast(int, entry["sample_index"]) for entry in (*tokens, *sequences)} | {*first})
        samples = dict(zip(indices, step_samples.read(indices), strict=True))
        record = {
            "step": step,
            "cause": found.cause,
            "verdict": found.verdict,
            "gap": found.gap,
            "causes": {**found.causes, "tokenisation": retokenize([samples[i] for i in first], self.tokenizer)},
            "worst_tokens": [described_token(token, samples, self.tokenizer) for token in tokens],
            "worst_samples": [described_sample(sequence, samples) for sequence in sequences],
        }
        replace_text(self.file, json.dumps(_clean(record), indent=2) + "\n")
        if too_large:
            raise TrainingError(self._describe_limit(step, found))
        changed, self._cause = found.cause != self._cause, found.cause
        return found.verdict if changed else None

    def _exceeds_limit(self, found: Diagnosis) -> bool:
        return bool(self.limit) and found.cause == "unexplained" and found.gap["abs_mean"] > self._largest_mean

    @property
    def _largest_mean(self) -> float:
        return self.limit * self.settings.rounding

    def _describe_limit(self, step: int, found: Diagnosis) -> str:
        return (
            f"step {step}: {found.verdict}. The mean is above {self._largest_mean:.0e}, {self.limit:g} times what"
            f" rounding explains (train.mismatch_limit): the run would train on samples of another policy. {self.file}"
            " lists the worst tokens; compare config.json, dtype and weights of the servers with model.path, or raise"
            " the limit (0: none)"
        )


def worst_tokens(minibatches: Sequence[Minibatch]) -> list[Json]:
    """Return this replica's tokens with the largest gaps, worst first; ``from_end`` counts from the response's end."""
    listed: list[Json] = []
    for batch in minibatches:
        size_R, ends_B = gap_sizes(batch), batch.starts_B + batch.lengths_B
        order_R = largest(size_R, WORST)
        for token, size in zip(batch.trained_R[order_R].tolist(), size_R[order_R].tolist(), strict=True):
            owner = int(torch.searchsorted(ends_B, token, right=True))
            listed.append(
                {
                    "size": size,
                    "sample_index": int(batch["sample_index_B"][owner]),
                    "from_end": int(ends_B[owner]) - token,
                    "rollout_logprob": float(batch["rollout_logprobs_T"][token]),
                    "trainer_logprob": float(batch["old_logprobs_T"][token]),
                    "weight_version": int(batch["weight_versions_T"][token]),
                }
            )
    return _merged([listed])


def worst_samples(minibatches: Sequence[Minibatch]) -> list[Json]:
    """Return this replica's responses with the largest mean gap, worst first."""
    listed: list[Json] = []
    for batch in minibatches:
        owners_R, size_R = batch.response_ids_T[batch.trained_R], gap_sizes(batch)
        zeros_B = torch.zeros(len(batch), dtype=torch.float64)
        means_B = zeros_B.index_add(0, owners_R, size_R) / batch.trainable_counts_B.clamp(min=1)
        largest_B = zeros_B.scatter_reduce(0, owners_R, size_R, "amax")
        for owner in largest(means_B, WORST).tolist():
            mean, most, sample = float(means_B[owner]), float(largest_B[owner]), int(batch["sample_index_B"][owner])
            listed.append({"size": mean, "sample_index": sample, "max": most})
    return _merged([listed])


def gap_sizes(batch: Batch) -> torch.Tensor:
    """Return the absolute gap of each trained token; NaN counts as infinite."""
    return log_gap(batch).abs().nan_to_num(nan=torch.inf)


def largest(values_N: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the largest values, largest first and equal ones in order, without sorting all of them."""
    if len(values_N) > count:
        bound = torch.topk(values_N, count).values[-1]
        above, equal = (values_N > bound).nonzero().flatten(), (values_N == bound).nonzero().flatten()
        chosen = torch.cat([above, equal[: count - len(above)]]).sort().values
    else:
        chosen = torch.arange(len(values_N))
    return chosen[torch.argsort(values_N[chosen], descending=True, stable=True)]


def _merged(lists: Sequence[list[Json]]) -> list[Json]:
    """Return the entries of several lists with the largest sizes, largest first and equal ones in order."""
    return sorted(chain.from_iterable(lists), key=lambda entry: -cast(float, entry["size"]))[:WORST]


def described_token(token: Json, samples: Mapping[int, RecordedSample], tokenizer: TextTokenizer) -> dict[str, object]:
    """Return an entry of ``worst_tokens`` with its text; ``position`` counts output tokens from 0."""
    sample = samples[cast(int, token["sample_index"])]
    ids = sample.output_ids
    position = len(ids) - cast(int, token["from_end"])
    return {
        "sample": sample.id,
        "prompt_id": sample.prompt_id,
        "position": position,
        "token_id": ids[position],
        "text": tokenizer.decode([ids[position]]),
        "before": tokenizer.decode(list(ids[max(0, position - CONTEXT) : position])),
        **{name: token[name] for name in ("rollout_logprob", "trainer_logprob", "weight_version")},
    }


def described_sample(sequence: Json, samples: Mapping[int, RecordedSample]) -> dict[str, object]:
    """Return an entry of ``worst_samples`` with its text."""
    sample = samples[cast(int, sequence["sample_index"])]
    return {
        "sample": sample.id,
        "prompt_id": sample.prompt_id,
        "mean": sequence["size"],
        "max": sequence["max"],
        "tokens": len(sample.output_ids),
        "text": sample.text,
    }


def retokenize(responses: Sequence[RecordedSample], tokenizer: TextTokenizer) -> dict[str, object]:
    """Return how many responses have other token ids after their text is decoded and encoded again.

    The trainer is not affected, because it never tokenizes text again; a program that scores text is.
    """
    other = []
    for response in responses:
        ids = list(response.output_ids)
        if tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids:
            other.append(response.id)
    return {"responses": len(responses), "other_ids": len(other), "samples": other[:WORST]}


def _first(output_tokens: Sequence[int]) -> list[int]:
    """Return the indices of the first responses within the limits of retokenization."""
    ends = accumulate(output_tokens[:MAX_RETOKENIZED])
    return [index for index, end in enumerate(ends) if end <= MAX_RETOKENIZED_TOKENS]


def _clean(value: object) -> object:
    """Return the value with NaN and infinity replaced by None, because JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
