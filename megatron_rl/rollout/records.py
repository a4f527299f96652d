"""What a run records about the groups of a step: samples, their fates, and counts.

A line of ``ledger.jsonl`` has the outcome of a group that was sampled for training:

    {"step": 3, "group": "0.3/p17", "samples": 8, "fate": "trained", "lag": 1}

Its samples are ``group/0`` to ``group/7``. The line is written when the step takes or drops the group; a resumed run
drops the lines of the steps that it repeats. So no group appears twice, and every step has the groups it requested.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import get_args

from megatron_rl.config.schema import Run
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch, Prompt, Response
from megatron_rl.rollout.buffer import NO_SIGNAL, SURPLUS, TOO_OLD, TRAINED, FinishedGroup, StepBatch
from megatron_rl.tasks.base import Failure, Verdict

Json = Mapping[str, object]


def step_samples(step: int, taken: StepBatch, batch: Batch, run: Run) -> StepSamples:
    """Return the records of a step whose batch is made of ``taken.used``."""
    trained = set(batch["group_ids_B"].tolist())
    samples = [(group.group.prompt, response) for group in taken.groups for response in group.group.responses]
    turns = turn_counts([response for _, response in samples]) if run.environment.name and samples else {}
    return StepSamples(
        output_tokens=[len(response.output_ids) for _, response in samples],
        read=lambda indices: [recorded_sample(*samples[index]) for index in indices],
        lines=_as_text(sample_lines(step, taken.groups, run.environment.role or "environment"))
        if run.log.rollouts
        else "",
        ledger=_as_text(ledger_lines(step, taken, trained)),
        counts=group_counts(taken) | failure_counts(taken.verdicts) | reward_means(taken.verdicts) | turns,
    )


def recorded_sample(prompt: Prompt, response: Response) -> RecordedSample:
    """Return a response as records show it."""
    return RecordedSample(response.id, prompt.id, prompt.text, response.text, response.output_ids.tolist())


def _as_text(lines: Iterable[Json]) -> str:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def sample_record(prompt: Prompt, response: Response, verdict: Verdict) -> dict[str, object]:
    """Return a response with its reward, as JSON."""
    return {
        "id": response.id,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": response.text,
        "reward": verdict.score,
        "rewards": dict(verdict.rewards),
        "correct": verdict.correct,
        "reason": verdict.reason,
        "finish_reason": response.finish_reason,
        "tokens": len(response.output_ids),
    }


def turn_records(response: Response, role: str) -> Iterator[Json]:
    """Yield the turns of a response: text, and span of output tokens; those of the model are trained."""
    ends = [0, *(end for span in response.observed for end in span), len(response.output_ids)]
    for index, (text, (start, end)) in enumerate(zip(response.turns, pairwise(ends), strict=True)):
        is_model = index % 2 == 0
        yield {"role": "assistant" if is_model else role, "text": text, "start": start, "end": end, "trained": is_model}


def sample_lines(step: int, groups: Sequence[FinishedGroup], role: str = "environment") -> Iterator[Json]:
    """Yield the lines of ``rollouts.jsonl``: one per response; ``role`` is that of the environment's turns."""
    for finished in groups:
        for response, verdict in zip(finished.group.responses, finished.verdicts, strict=True):
            record = sample_record(finished.group.prompt, response, verdict)
            turns = {"turns": list(turn_records(response, role))} if response.turns else {}
            yield {"step": step, **record, **turns, "weight_versions": response.weight_versions}


def ledger_lines(step: int, taken: StepBatch, trained: Collection[int]) -> Iterator[Json]:
    """Yield the lines of ``ledger.jsonl``; ``trained`` has the indices of the used groups that are in the batch."""
    for index, finished in enumerate(taken.used):
        yield _ledger_line(step, finished, TRAINED if index in trained else NO_SIGNAL)
    for dropped in taken.dropped:
        yield _ledger_line(step, dropped.finished, dropped.fate)


def _ledger_line(step: int, finished: FinishedGroup, fate: str) -> Json:
    oldest = finished.group.oldest_version
    lag = None if oldest < 0 else step - oldest
    return {"step": step, "group": finished.group.id, "samples": len(finished.verdicts), "fate": fate, "lag": lag}


def group_counts(taken: StepBatch) -> dict[str, float | int]:
    """Return how many groups of a step are not trained on, by reason, and the number of resampling rounds."""
    sampled = [*taken.used, *(dropped.finished for dropped in taken.dropped if dropped.fate != TOO_OLD)]
    no_signal = sum(not group.has_signal for group in sampled)
    fates = Counter(dropped.fate for dropped in taken.dropped)
    return {
        "zero_variance_fraction": no_signal / len(sampled),
        "groups_no_signal": no_signal,
        "groups_surplus": fates[SURPLUS],
        "groups_too_old": fates[TOO_OLD],
        "refills": taken.resample_rounds,
    }


def turn_counts(responses: Sequence[Response]) -> dict[str, float | int]:
    """Return the metrics of responses with several turns."""
    turns = [len(response.observed) + 1 for response in responses]
    observed = [end - start for response in responses for start, end in response.observed]
    tokens = sum(len(response.output_ids) for response in responses)
    return {
        "turns_mean": sum(turns) / len(turns),
        "turns_max": max(turns),
        "environment_tokens_mean": sum(observed) / len(observed) if observed else 0.0,
        "environment_tokens_fraction": sum(observed) / tokens if tokens else 0.0,
    }


def failure_counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return how many responses have no score, by what happened to their verifier."""
    failures = Counter(verdict.failure for verdict in verdicts)
    return {f"unverified_{failure}": failures[failure] for failure in get_args(Failure) if failure}


def reward_means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the mean of each reward over the verified responses; empty if there is only one reward."""
    rewards = [verdict.rewards for verdict in verdicts if verdict.rewards]
    return {f"reward/{name}": sum(r[name] for r in rewards) / len(rewards) for name in (rewards[0] if rewards else ())}


def unverified_message(step: int, verdicts: Sequence[Verdict]) -> str | None:
    """Return a message with the number of failures of verifiers and the first reason; None without failures."""
    failed = [verdict for verdict in verdicts if verdict.failure not in ("", "declined")]
    if not failed:
        return None
    counts = Counter(verdict.failure.replace("_", " ") for verdict in failed)
    reasons = ", ".join(f"{count} {failure}" for failure, count in counts.items())
    total = f"{len(failed)} of {len(verdicts)} responses unverified"
    return f"step {step}: {total} ({reasons}); the first: {failed[0].reason}"
