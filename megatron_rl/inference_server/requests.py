"""The requests that the embedded server accepts: validation of HTTP bodies, and the sequences to generate."""

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_rl.data.types import fold_seed

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)


class BadRequest(ValueError):
    """The request is invalid; answered with status 400."""


MAX_SEQUENCES = 1 << 14
"""Sequences per request, over all prompts and their ``n``."""

MAX_TOKEN_ID = (1 << 31) - 1

_StopString = Annotated[str, Field(min_length=1, max_length=1024)]
_TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
_Id = Annotated[str, Field(max_length=1024)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingParams(_Strict):
    """The sampling parameters of SGLang that the embedded server supports; others are refused, not ignored."""

    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] = 128
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 1
    stop: _StopString | Annotated[tuple[_StopString, ...], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[tuple[_TokenId, ...], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    """Also disables ``stop_token_ids``, as in SGLang."""
    skip_special_tokens: bool = True
    sampling_seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p exclude tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; an empty tuple if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class GenerateBody(_Strict):
    """The body of ``POST /generate``: one prompt, or several, with one value for all of them or a list of values."""

    input_ids: list[int] | list[list[int]]
    sampling_params: SamplingParams | list[SamplingParams] = SamplingParams()
    rid: _Id | list[_Id] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    return_routed_experts: bool = False
    return_sampling_mask: bool = False
    routed_experts_start_len: int | list[int] = 0
    stream: bool = False


class Request:
    """The sequences of one HTTP request, which are answered together."""

    def __init__(self, sequences: "list[ActiveSequence]", single: bool, stream: bool) -> None:
        self.sequences = sequences
        self.single = single
        """Whether the answer is one object instead of a list."""
        self.stream = stream
        self.waiting = list(sequences)
        """Sequences that are not being decoded: not started yet, or retracted."""
        self.num_unfinished = len(sequences)
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # a client that disconnects must not cancel the engine's future
        for index, sequence in enumerate(sequences):
            sequence.request, sequence.index = self, index

    def finish_one(self) -> None:
        """Count one sequence as finished."""
        self.num_unfinished -= 1
        if not self.num_unfinished and not self.done.done():
            self.done.set_result(None)


@dataclass(eq=False)
class ActiveSequence:
    """One sequence to generate or score."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    input_start: int
    """First position whose prompt log-probs are returned; -1: none are."""
    limit: int
    """Maximum number of output tokens: the requested number, or what the context allows."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, index of the first output token generated with it)."""
    finish_reason: Mapping[str, str | int | None] | None = None
    num_retractions: int = 0
    seed: int | None = None
    return_sampling_mask: bool = False
    """Whether to return the ids that each token was sampled from."""
    mask_ids: list[list[int]] = field(default_factory=list)
    """Ids that each output token was sampled from; empty if not returned."""
    mask_logprobs: list[float] = field(default_factory=list)
    """Log-probability of each output token among these ids, in nats; empty if not returned."""
    return_routes: bool = False
    """Whether to return the experts that each token was routed to."""
    routes_start: int = 0
    """Number of first tokens whose routes are not returned."""
    routes: Tensor | None = None
    """int16 [tokens but the last, L, K], see ``RouteRecorder``; None if not returned, or not decoded yet."""
    prefix_routes: Tensor | None = None
    """Routes of the tokens that existed when decoding began, or began again after a retraction."""
    request: Request = field(init=False, repr=False)
    index: int = field(init=False)
    """Index in its request."""

    def note_version(self, version: str, position: int) -> None:
        """Record that output tokens from this position on are generated with this version of the weights."""
        if self.versions and self.versions[-1][1] == position:
            self.versions.pop()
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, position))


def validated(validate: Callable[[T], Body], value: T) -> Body:
    """Return the validated body of a request.

    Raises:
        BadRequest: the first field that is invalid.
    """
    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{where}: {first['msg']}, got {str(first['input'])[:80]}") from error


def parse_request(raw: bytes) -> Request:
    """Return the sequences of a request body: for each prompt its ``n`` sequences.

    Raises:
        BadRequest: the body is invalid.
    """
    body = validated(GenerateBody.model_validate_json, raw)
    prompts = _prompts(body.input_ids)
    params = _per_prompt("sampling_params", body.sampling_params, len(prompts))
    rids = [None] * len(prompts) if body.rid is None else _per_prompt("rid", body.rid, len(prompts))
    logprobs = _per_prompt("return_logprob", body.return_logprob, len(prompts))
    if body.return_sampling_mask and not all(p.truncates for p in params):
        raise BadRequest("return_sampling_mask: nothing is masked; write top_k or top_p in sampling_params")
    skipped = _per_prompt("routed_experts_start_len", body.routed_experts_start_len, len(prompts))
    starts = _per_prompt("logprob_start_len", body.logprob_start_len, len(prompts))
    if (count := sum(p.n for p in params)) > MAX_SEQUENCES:
        raise BadRequest(f"n: {count} sequences in one request; send at most {MAX_SEQUENCES}")
    for prompt, start in zip(prompts, starts, strict=True):
        if not -1 <= start < len(prompt):
            raise BadRequest(
                f"logprob_start_len is {start}; send -1, or a position of the prompt ({len(prompt)} tokens)"
            )
    sequences = [
        # With n > 1 SGLang replaces the given ids by new ones. The seeds must differ, or all n outputs would be equal.
        ActiveSequence(
            rid=(rid if p.n == 1 else None) or uuid.uuid4().hex,
            prompt=prompt,
            params=p,
            return_logprob=logprob,
            input_start=start if logprob else -1,
            limit=p.max_new_tokens,
            seed=_seed_of(p, i),
            return_routes=body.return_routed_experts,
            return_sampling_mask=body.return_sampling_mask,
            routes_start=skip,
        )
        for prompt, p, rid, logprob, start, skip in zip(prompts, params, rids, logprobs, starts, skipped, strict=True)
        for i in range(p.n)
    ]
    single = len(sequences) == 1 and not (body.input_ids and isinstance(body.input_ids[0], list))
    if body.stream and not single:
        raise BadRequest("stream: the embedded server streams one sequence per request; send one prompt with n = 1")
    return Request(sequences, single, body.stream)


def _seed_of(params: SamplingParams, index: int) -> int | None:
    if index == 0 or params.sampling_seed is None:
        return params.sampling_seed
    return fold_seed((params.sampling_seed, index))


def _prompts(input_ids: list[int] | list[list[int]]) -> list[list[int]]:
    prompts = [ids for ids in input_ids if isinstance(ids, list)] or [[i for i in input_ids if isinstance(i, int)]]
    if not all(prompts):
        raise BadRequest("input_ids: a prompt is empty; send at least one token")
    return prompts


def _per_prompt(name: str, value: T | list[T], prompts: int) -> list[T]:
    if not isinstance(value, list):
        return [value] * prompts
    if len(value) != prompts:
        raise BadRequest(f"{name}: {len(value)} entries for {prompts} prompts; send one each, or one for all")
    return value
