"""What the embedded server admits: generate requests, checked field by field, and the rows they become."""

import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_rl.data.types import fold_seed

T = TypeVar("T")


class BadRequest(ValueError):
    """The request cannot be served as it is; answered with status 400."""


_StopString = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingParams(_Strict):
    """SGLang's sampling parameters, as far as the embedded server has them; others are refused, never ignored."""

    max_new_tokens: Annotated[int, Field(ge=0)] = 128
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: _StopString | tuple[_StopString, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    """Also switches ``stop_token_ids`` off, as in SGLang."""
    skip_special_tokens: bool = True
    sampling_seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None

    @property
    def narrows(self) -> bool:
        """Whether some tokens are excluded from the draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none as an empty tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class GenerateBody(_Strict):
    """The body of ``POST /generate``: one prompt, or a list of prompts with lists for whatever differs."""

    input_ids: list[int] | list[list[int]]
    sampling_params: SamplingParams | list[SamplingParams] = SamplingParams()
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    return_routed_experts: bool = False
    stream: bool = False


class Work:
    """The rows of one HTTP request: they are answered together."""

    def __init__(self, rows: "list[Row]", single: bool, stream: bool) -> None:
        self.rows = rows
        self.single = single
        """The answer is one object, not a list."""
        self.stream = stream
        self.waiting = list(rows)
        """Rows that are not being decoded yet, or were sent back."""
        self.open = len(rows)
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # a client that goes away must not cancel it under the engine
        for index, row in enumerate(rows):
            row.work, row.index = self, index

    def close_one(self) -> None:
        """Count one row as finished."""
        self.open -= 1
        if not self.open and not self.done.done():
            self.done.set_result(None)


@dataclass(eq=False)
class Row:
    """One sequence to decode."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    input_start: int
    """Position from which the log-probs of the prompt are wanted; -1: not wanted."""
    limit: int
    """Most output tokens: what was asked for, or what the context leaves."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, first output token made with it)."""
    finish: Mapping[str, str | int | None] | None = None
    num_retractions: int = 0
    seed: int | None = None
    returns_routes: bool = False
    """Whether the experts that its tokens took are wanted."""
    routes: Tensor | None = None
    """int16 [tokens but the last, A, E], see ``RouteRecorder``; None: not wanted, or not decoded yet."""
    prefix_routes: Tensor | None = None
    """Those of the tokens that were there when decoding began, or began again under other weights."""
    work: Work = field(init=False, repr=False)
    index: int = field(init=False)
    """Position among the rows of its request."""

    def note_version(self, version: str, position: int) -> None:
        """Record that output tokens from this position on come from these weights."""
        if self.versions and self.versions[-1][1] == position:
            self.versions.pop()
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, position))


def parse_work(raw: bytes) -> Work:
    """Return the rows that a request body asks for, prompt-major with n answers each."""
    try:
        body = GenerateBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadRequest(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {str(first['input'])[:80]}"
        ) from error
    prompts = _prompts(body.input_ids)
    params = _per_prompt("sampling_params", body.sampling_params, len(prompts))
    rids = [None] * len(prompts) if body.rid is None else _per_prompt("rid", body.rid, len(prompts))
    logprobs = _per_prompt("return_logprob", body.return_logprob, len(prompts))
    starts = _per_prompt("logprob_start_len", body.logprob_start_len, len(prompts))
    rows = [
        # With n > 1 SGLang replaces the given rids by new ones; the seeds must differ or all n answers would be equal.
        Row(
            rid=(rid if p.n == 1 else None) or uuid.uuid4().hex,
            prompt=prompt,
            params=p,
            return_logprob=logprob,
            input_start=start if logprob else -1,
            limit=p.max_new_tokens,
            seed=_seed_of(p, i),
            returns_routes=body.return_routed_experts,
        )
        for prompt, p, rid, logprob, start in zip(prompts, params, rids, logprobs, starts, strict=True)
        for i in range(p.n)
    ]
    single = len(rows) == 1 and not (body.input_ids and isinstance(body.input_ids[0], list))
    if body.stream and not single:
        raise BadRequest("stream: the embedded server streams one sequence a request; send one prompt with n = 1")
    return Work(rows, single, body.stream)


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
