"""From prompts to requests and back: what is asked for depends on the prompts and the seed, never on the servers."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rl.config.schema import Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt, Response, fold_seed
from megatron_rl.fleet.protocol import BadAnswer, Json, Sample, SampleRequest


@dataclass(frozen=True)
class Chunk:
    """Whole groups that go to one server in one request."""

    prompts: tuple[Prompt, ...]
    requests: tuple[SampleRequest, ...]
    group_size: int


def plan(
    prompts: Sequence[Prompt],
    group_size: int,
    params: Json,
    seeds: Sequence[int],
    rows_per_request: int,
    routes: RouteShape | None = None,
) -> list[Chunk]:
    """Return the requests for ``group_size`` responses to each prompt.

    Every response has its own seed, folded from the seeds given (run, step), its prompt's id and its index; and an id
    that names the same. The cut into chunks is fixed by the arguments, so the same call is the same requests.
    """
    at_once = max(1, rows_per_request // group_size)
    repeats: Counter[str] = Counter()
    chunks = []
    for start in range(0, len(prompts), at_once):
        part = tuple(prompts[start : start + at_once])
        requests: list[SampleRequest] = []
        for prompt in part:
            repeat = repeats[prompt.id]
            repeats[prompt.id] += 1
            named = [_request(prompt, repeat, index, params, seeds) for index in range(group_size)]
            requests += [replace(request, routes=routes) for request in named]
        chunks.append(Chunk(part, tuple(requests), group_size))
    return chunks


def _request(prompt: Prompt, repeat: int, index: int, params: Json, seeds: Sequence[int]) -> SampleRequest:
    prompt_hash = int.from_bytes(hashlib.sha256(prompt.id.encode()).digest()[:8], "little")
    seed = fold_seed((*seeds, prompt_hash, repeat, index))
    name = f"{prompt.id}#{repeat}" if repeat else prompt.id  # the same prompt twice in a step
    rid = "/".join([".".join(map(str, seeds)), name, str(index)])
    return SampleRequest(rid, prompt.input_ids, {**params, "sampling_seed": seed})


def sampling_params(sampling: Sampling) -> Json:
    """Return the wire form of the sampling section."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def groups(chunk: Chunk, samples: Sequence[Sample]) -> list[Group]:
    """Return the chunk's prompts with their responses."""
    responses = [
        _response(chunk.prompts[i // chunk.group_size], i % chunk.group_size, request, sample)
        for i, (request, sample) in enumerate(zip(chunk.requests, samples, strict=True))
    ]
    return [
        Group(prompt, tuple(responses[i * chunk.group_size : (i + 1) * chunk.group_size]))
        for i, prompt in enumerate(chunk.prompts)
    ]


def _response(prompt: Prompt, index: int, request: SampleRequest, sample: Sample) -> Response:
    return Response(
        id=request.rid,
        prompt_id=prompt.id,
        index=index,
        output_ids=sample.output_ids,
        logprobs=sample.logprobs,
        text=sample.text,
        finish_reason=sample.finish_reason,
        weight_versions=tuple((_number(v, request.rid), start, end) for v, start, end in sample.weight_versions),
        routes=None if sample.routes is None else torch.from_numpy(sample.routes),
    )


def _number(version: str, rid: str) -> int:
    if not version.isdigit():
        raise BadAnswer(f"{rid}: made with weights {version!r}; versions are numbers, set by the fleet")
    return int(version)
