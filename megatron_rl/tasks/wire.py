"""Messages between the verifying processes and the process that started them: one JSON object per line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_rl.data.types import Prompt, Response
from megatron_rl.tasks.base import Verdict

Json = Mapping[str, Any]


def encode_job(number: int, prompt: Prompt, response: Response) -> bytes:
    """Return the line that requests a verdict. Of the token columns it has the ids only."""
    message = {
        "prompt": {"id": prompt.id, "text": prompt.text, "answer": prompt.answer, "metadata": dict(prompt.metadata)},
        "response": replace(response, logprobs=np.empty(0), weight_versions=(), routes=None, mask_ids=None).to_json(),
    }
    return encode_line({"job": number, **message})


def renumber_job(job: bytes, number: int) -> bytes:
    """Return the line of a job with another number."""
    start, rest = job.split(b",", 1)
    assert start.startswith(b'{"job": '), f"begins with {start!r}"
    return b'{"job": %d,' % number + rest


def decode_job(message: Json) -> tuple[Prompt, Response]:
    """Return the prompt (without tokens) and the response (without log-probs) of a message of ``encode_job``."""
    return Prompt(input_ids=(), **message["prompt"]), Response.from_json(message["response"])


def encode_batch(jobs: Sequence[bytes]) -> bytes:
    """Return the line that requests the verdicts of servers on many jobs, given as lines."""
    return b'{"jobs": [' + b",".join(job.rstrip() for job in jobs) + b"]}\n"


def encode_batch_verdicts(verdicts: Sequence[Mapping[str, Verdict]]) -> bytes:
    """Return the line that answers ``encode_batch``."""
    answers = [{name: asdict(verdict) for name, verdict in by_name.items()} for by_name in verdicts]
    return encode_line({"batch_verdicts": answers})


def add_known_verdicts(job: bytes, verdicts: Json) -> bytes:
    """Return the line of a job with the verdicts of servers added."""
    return encode_line({**json.loads(job), "known": verdicts})


def decode_known_verdicts(message: Json) -> Mapping[str, Verdict]:
    """Return the verdicts that ``add_known_verdicts`` added to a job, by name of the reward."""
    return {name: Verdict(**fields) for name, fields in message.get("known", {}).items()}


def encode_verdict(verdict: Verdict, *, last: bool = False) -> bytes:
    """Return the line that answers a job. ``last`` says that the worker exits after it."""
    return encode_line({"verdict": asdict(verdict), "last": last})


def encode_line(value: object) -> bytes:
    """Return a value as one line of JSON."""
    return json.dumps(value).encode() + b"\n"
