"""Builds requests from prompts, and groups from results. Requests depend on prompts and seed, not on servers."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from megatron_rl.config.rollout import Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt, Response, fold_seed
from megatron_rl.fleet.protocol import BadAnswer, GenerationRequest, GenerationResult, Json


@dataclass(frozen=True)
class HttpRequest:
    """The sequences of one HTTP request, with the prompt of each, and its index within the prompt's group."""

    prompts: tuple[Prompt, ...]
    indices: tuple[int, ...]
    sequences: tuple[GenerationRequest, ...]

    def responses(self, results: Sequence[GenerationResult]) -> list[Response]:
        """Return the results as responses."""
        parts = zip(self.prompts, self.indices, self.sequences, results, strict=True)
        return [_response(prompt, index, sequence, result) for prompt, index, sequence, result in parts]

    def split(self) -> "list[HttpRequest]":
        """Return a request for each sequence."""
        parts = zip(self.prompts, self.indices, self.sequences, strict=True)
        return [HttpRequest((prompt,), (index,), (sequence,)) for prompt, index, sequence in parts]


@dataclass(frozen=True)
class RequestBatch:
    """Whole groups that are returned together, and the HTTP requests for them, in order."""

    prompts: tuple[Prompt, ...]
    requests: tuple[HttpRequest, ...]
    group_size: int

    def groups(self, responses: Sequence[Response]) -> list[Group]:
        """Return the prompts with their responses."""
        size = self.group_size
        return [Group(prompt, tuple(responses[i * size : (i + 1) * size])) for i, prompt in enumerate(self.prompts)]


def plan_requests(
    prompts: Sequence[Prompt],
    group_size: int,
    params: Json,
    seeds: Sequence[int],
    sequences_per_request: int,
    routes: RouteShape | None = None,
    keep_mask: bool = False,
    vocabulary: int = 1 << 31,
) -> list[RequestBatch]:
    """Return the requests for ``group_size`` responses to each prompt.

    Every response has a seed, folded from the given seeds (run, step), its prompt's id and its index, and an id that
    names the same. The division depends only on the arguments, so equal calls give equal requests. With
    ``sequences_per_request = 1`` a batch is one group, and each of its sequences is a request. A larger number gives
    batches of so many sequences, in whole groups, at least one, and each batch is one request.
    """
    prompts_per_batch = max(1, sequences_per_request // group_size)
    repeats: Counter[str] = Counter()
    batches = []
    for start in range(0, len(prompts), prompts_per_batch):
        part = tuple(prompts[start : start + prompts_per_batch])
        sequences: list[GenerationRequest] = []
        for prompt in part:
            repeat = repeats[prompt.id]
            repeats[prompt.id] += 1
            group = [_request(prompt, repeat, index, params, seeds) for index in range(group_size)]
            sequences += [replace(r, routes=routes, keep_mask=keep_mask, vocabulary=vocabulary) for r in group]
        repeated = tuple(prompt for prompt in part for _ in range(group_size))
        request = HttpRequest(repeated, (*range(group_size),) * len(part), tuple(sequences))
        requests = request.split() if sequences_per_request == 1 else [request]
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
        mask_ids=None if result.mask_ids is None else _padded(result.mask_ids),
    )


def _padded(ids: Sequence[Sequence[int]]) -> Tensor:
    """Return lists of token ids as int32 [lists, longest list], filled up with -1."""
    counts = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    width = int(counts.max()) if len(counts) else 0
    padded = torch.full((len(ids), width), -1, dtype=torch.int32)
    padded[torch.arange(width) < counts[:, None]] = torch.tensor([*chain.from_iterable(ids)], dtype=torch.int32)
    return padded


def _number(version: str, rid: str) -> int:
    if not version.isdigit():
        raise BadAnswer(f"{rid}: generated with weights {version!r}; versions are numbers, set by the fleet")
    return int(version)
