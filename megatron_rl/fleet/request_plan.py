"""Builds requests from prompts, and groups from results. Requests depend on prompts and seed, not on servers."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rl.config.schema import Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt, Response, fold_seed
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, GenerationResult, Json


@dataclass(frozen=True)
class RequestBatch:
    """Whole groups that are sent to one server in one HTTP request."""

    prompts: tuple[Prompt, ...]
    requests: tuple[GenerationRequest, ...]
    group_size: int


def plan_requests(
    prompts: Sequence[Prompt],
    group_size: int,
    params: Json,
    seeds: Sequence[int],
    sequences_per_request: int,
    routes: RouteShape | None = None,
) -> list[RequestBatch]:
    """Return the requests for ``group_size`` responses to each prompt.

    Every response has a seed, folded from the given seeds (run, step), its prompt's id and its index, and an id that
    names the same. The division into batches depends only on the arguments, so equal calls give equal requests.
    """
    prompts_per_batch = max(1, sequences_per_request // group_size)
    repeats: Counter[str] = Counter()
    batches = []
    for start in range(0, len(prompts), prompts_per_batch):
        part = tuple(prompts[start : start + prompts_per_batch])
        requests: list[GenerationRequest] = []
        for prompt in part:
            repeat = repeats[prompt.id]
            repeats[prompt.id] += 1
            group = [_request(prompt, repeat, index, params, seeds) for index in range(group_size)]
            requests += [replace(request, routes=routes) for request in group]
        batches.append(RequestBatch(part, tuple(requests), group_size))
    return batches


def _request(prompt: Prompt, repeat: int, index: int, params: Json, seeds: Sequence[int]) -> GenerationRequest:
    prompt_hash = int.from_bytes(hashlib.sha256(prompt.id.encode()).digest()[:8], "little")
    seed = fold_seed((*seeds, prompt_hash, repeat, index))
    name = f"{prompt.id}#{repeat}" if repeat else prompt.id  # the same prompt twice in a step
    rid = "/".join([".".join(map(str, seeds)), name, str(index)])
    return GenerationRequest(rid, prompt.input_ids, {**params, "sampling_seed": seed})


def sampling_params(sampling: Sampling) -> Json:
    """Return the ``sampling_params`` of a request."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
    }


def build_groups(batch: RequestBatch, results: Sequence[GenerationResult]) -> list[Group]:
    """Return the batch's prompts with their responses."""
    size = batch.group_size
    responses = [
        _response(batch.prompts[i // size], i % size, request, result)
        for i, (request, result) in enumerate(zip(batch.requests, results, strict=True))
    ]
    return [Group(prompt, tuple(responses[i * size : (i + 1) * size])) for i, prompt in enumerate(batch.prompts)]


def _response(prompt: Prompt, index: int, request: GenerationRequest, result: GenerationResult) -> Response:
    return Response(
        id=request.rid,
        prompt_id=prompt.id,
        index=index,
        output_ids=result.output_ids,
        logprobs=result.logprobs,
        text=result.text,
        finish_reason=result.finish_reason,
        weight_versions=tuple((_number(v, request.rid), start, end) for v, start, end in result.weight_versions),
        routes=None if result.routes is None else torch.from_numpy(result.routes),
    )


def _number(version: str, rid: str) -> int:
    if not version.isdigit():
        raise BadAnswer(f"{rid}: generated with weights {version!r}; versions are numbers, set by the fleet")
    return int(version)
