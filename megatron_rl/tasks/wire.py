"""What the verifying processes and their owner say to each other: one JSON object a line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_rl.data.types import Prompt, Response
from megatron_rl.tasks.base import Verdict

Json = Mapping[str, Any]


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


def read_job(asked: Json) -> tuple[Prompt, Response]:
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


def ask(jobs: Sequence[bytes]) -> bytes:
    """Return the line that asks what servers say of many jobs."""
    return b'{"jobs": [' + b",".join(job.rstrip() for job in jobs) + b"]}\n"


def known(job: bytes, verdicts: Json) -> bytes:
    """Return the line of a job with what servers said of it."""
    return line({**json.loads(job), "known": verdicts})


def read_known(asked: Json) -> Mapping[str, Verdict]:
    """Return what ``known`` put into a job: verdicts by the name of their reward."""
    return {name: Verdict(**said) for name, said in asked.get("known", {}).items()}


def asked(known: Sequence[Mapping[str, Verdict]]) -> bytes:
    """Return the line that answers ``ask``."""
    return line({"asked": [{name: asdict(said) for name, said in verdicts.items()} for verdicts in known]})


def verdict(said: Verdict, *, last: bool = False) -> bytes:
    """Return the line that answers a job; ``last``: whoever says it ends."""
    return line({"verdict": asdict(said), "last": last})


def line(value: object) -> bytes:
    """Return a value as a line."""
    return json.dumps(value).encode() + b"\n"
