"""Generation with vLLM 0.32: its answers are converted to SGLang's format and validated like them, without torch.

vLLM has token-in token-out generation with log-probs and a weight version per token. It has no request for several
sequences with a seed each, so each sequence is one request.
"""

import asyncio
import base64
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from megatron_rl.data.routes import encode_routes
from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, GenerationResult, Json, parse_json, parse_results

GENERATE = "/inference/v1/generate"


class VllmHttpClient(HttpClient):
    """Client of one vLLM server, for generation."""

    api: ClassVar[str] = "vllm"
    health_is_progress: ClassVar[bool] = False

    async def generate(
        self, requests: Sequence[GenerationRequest], version: str | Collection[str] | None = None
    ) -> list[GenerationResult]:
        """Sample or score these sequences, with one concurrent HTTP request per sequence."""
        return list(await asyncio.gather(*(self._generate_one(request, version) for request in requests)))

    async def _generate_one(
        self, request: GenerationRequest, version: str | Collection[str] | None
    ) -> GenerationResult:
        raw = await self._request("POST", GENERATE, generate_body(request), self.request_timeout_seconds)
        answer = parse_json(raw, self.url)
        [result] = parse_results([to_sglang(answer, request, self.url)], [request], self.url, version)
        return result


def generate_body(request: GenerationRequest) -> Json:
    """Return the body of the request for one sequence."""
    params = request.sampling_params
    scoring = request.max_new_tokens == 0
    names = ("temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos")
    return {
        "request_id": request.rid,
        "token_ids": request.input_ids,
        "output_mode": "text",
        "sampling_params": {
            **{name: params[name] for name in names if name in params},
            "max_tokens": max(request.max_new_tokens, 1),
            "logprobs": 0,
            **({"seed": params["sampling_seed"]} if "sampling_seed" in params else {}),
            **({"prompt_logprobs": 0} if scoring else {}),
        },
    }


def to_sglang(answer: object, request: GenerationRequest, source: str) -> Json:
    """Return a vLLM answer in SGLang's format.

    Raises:
        BadAnswer: a field is missing or has the wrong type.
    """
    try:
        assert isinstance(answer, dict)
        [choice] = answer["choices"]
        return _converted(answer, choice, request)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__} {error}"
        raise BadAnswer(f"{source}{GENERATE}: not an answer of vLLM ({problem}): {str(answer)[:120]}") from error


def _converted(answer: Mapping[str, Any], choice: Mapping[str, Any], request: GenerationRequest) -> Json:
    scoring = request.max_new_tokens == 0
    ids = [] if scoring else choice["token_ids"]
    kind = "length" if scoring else choice["finish_reason"]
    meta: dict[str, object] = {
        "id": request.rid,
        "finish_reason": {"type": kind, "length": len(ids)},
        "completion_tokens": len(ids),
        "weight_versions": [] if scoring else choice["weight_versions"],
        "output_token_logprobs": _logprobs(choice, ids),
        "routed_experts": _routes(choice.get("routed_experts"), request.routes_start),
    }
    if scoring:
        entries = answer["prompt_logprobs"]
        meta["input_token_logprobs"] = [
            [entry[str(i)]["logprob"] if entry else None, i]
            for i, entry in zip(request.input_ids, entries, strict=True)
        ]
    return {"text": "" if scoring else choice["text"], "output_ids": ids, "meta_info": meta}


def _logprobs(choice: Mapping[str, Any], ids: Sequence[int]) -> list[list[object]]:
    if not ids:
        return []
    return [[entry["logprob"], i] for entry, i in zip(choice["logprobs"]["content"], ids, strict=True)]


def _routes(record: str | None, start: int) -> str | None:
    """Return the routes from a token on in SGLang's format; vLLM sends an array in numpy's file format."""
    if record is None:
        return None
    return encode_routes(np.load(io.BytesIO(base64.b64decode(record)), allow_pickle=False)[start:])
