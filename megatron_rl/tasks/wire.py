"""What the verifying processes and their owner say to each other: one JSON object a line."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_rl.data.types import Prompt, Response
from megatron_rl.tasks.base import Failure, Verdict


def job(number: int, prompt: Prompt, response: Response) -> bytes:
    """Return the line that asks for a verdict: of the tokens only what a verifier sees."""
    asked = {
        "prompt": {"id": prompt.id, "text": prompt.text, "answer": prompt.answer, "metadata": dict(prompt.metadata)},
        "response": {
            "id": response.id,
            "index": response.index,
            "output_ids": response.output_ids,
            "text": response.text,
            "finish_reason": response.finish_reason,
            "observed": response.observed,
            "last_turn": response.last_turn,
        },
    }
    return line({"job": number, **asked})


def read_job(asked: Mapping[str, Any]) -> tuple[Prompt, Response]:
    """Return what ``job`` wrote; the prompt has no tokens, the response no log-probs."""
    said, prompt = asked["response"], Prompt(input_ids=(), **asked["prompt"])
    response = Response(
        id=said["id"],
        prompt_id=prompt.id,
        index=said["index"],
        output_ids=tuple(said["output_ids"]),
        logprobs=(),
        text=said["text"],
        finish_reason=said["finish_reason"],
        weight_versions=(),
        observed=tuple((start, end) for start, end in said["observed"]),
        last_turn=said["last_turn"],
    )
    return prompt, response


def verdict(said: Verdict) -> bytes:
    """Return the line that answers."""
    return line(asdict(said))


def failed(failure: Failure, reason: str) -> Verdict:
    """Return the verdict of a verifier that gave none."""
    return Verdict(None, False, reason, failure)


def line(value: object) -> bytes:
    """Return a value as a line."""
    return json.dumps(value).encode() + b"\n"
