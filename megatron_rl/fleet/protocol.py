"""The HTTP API of SGLang 0.5.23 as used here: paths, request bodies, and strict validation of answers.

``tests/contract`` checks it against the real server. This module does not import torch. Requests carry token ids only:
a prompt is tokenized once, by the task.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import numpy as np
from pydantic_core import from_json

from megatron_rl.data.arrays import ArrayEquality
from megatron_rl.data.routes import RouteShape
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.answer_columns import NO_COLUMNS, Column, LogprobRows, cut_columns

_NONE = np.empty(0, np.float32)
_LEAST_LOGPROB = float(np.finfo(np.float32).min)
T = TypeVar("T")
C = TypeVar("C", np.ndarray, LogprobRows)
Json = Mapping[str, object]
MaskIds = tuple[tuple[int, ...], ...]
"""For each output token, the ids that it was sampled from."""


API_KEY = "MEGATRON_RL_API_KEY"
"""Environment variable with the key that servers ask for: of ``serve --api-key``, or SGLang's and vLLM's own."""


class Endpoint(StrEnum):
    """Paths of the API."""

    GENERATE = "/generate"
    HEALTH = "/health"
    """SGLang generates a token to answer this, which takes at least a second."""
    HEALTH_GENERATE = "/health_generate"
    SERVER_INFO = "/server_info"
    MODEL_INFO = "/model_info"
    PAUSE = "/pause_generation"
    CONTINUE = "/continue_generation"
    FLUSH = "/flush_cache"
    ABORT = "/abort_request"
    BEGIN_UPDATE = "/begin_weight_update"
    UPDATE_FROM_TENSOR = "/update_weights_from_tensor"
    JOIN_GROUP = "/init_weights_update_group"
    UPDATE_FROM_DISTRIBUTED = "/update_weights_from_distributed"
    UPDATE_FROM_HANDLE = "/update_weights_from_handle"
    """Only the embedded server has this one."""
    UPDATE_FROM_STREAM = "/update_weights_from_stream"
    """Only the embedded server has this one."""
    LEAVE_GROUP = "/destroy_weights_update_group"
    END_UPDATE = "/end_weight_update"
    UPDATE_FROM_DISK = "/update_weights_from_disk"
    UPDATE_VERSION = "/update_weight_version"
    WEIGHTS_CHECKER = "/weights_checker"


class ServerUnreachable(RolloutError):
    """The server did not answer: connection error, timeout, or status 5xx."""


class ServerTimeout(ServerUnreachable):
    """The server did not answer in time."""


class RequestRefused(RolloutError):
    """The server answered 4xx: the request is invalid, and another server would refuse it too."""


class BadAnswer(RolloutError):
    """The server's answer is invalid."""


class WrongVersion(BadAnswer):
    """The answer was generated with other weights than requested."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to sample, or to score if ``max_new_tokens`` is 0."""

    rid: str
    input_ids: tuple[int, ...]
    sampling_params: Json
    routes: RouteShape | None = None
    """Shape of the routes, if the server should return the experts that each token was routed to."""
    keep_mask: bool = False
    """Whether the server should return the ids that top-k and top-p left to sample each token from."""
    routes_start: int = 0
    """Number of first tokens whose routes are not returned, because an earlier answer has them."""
    vocabulary: int = 1 << 31
    """Number of tokens of the trainer's model: an answer with another token cannot be trained."""

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens to sample; 0 scores the input."""
        limit = self.sampling_params["max_new_tokens"]
        assert isinstance(limit, int), f"max_new_tokens is {limit!r}"
        return limit


@dataclass(frozen=True, eq=False)
class GenerationResult(ArrayEquality):
    """One validated answer."""

    rid: str
    output_ids: np.ndarray
    """Int32."""
    logprobs: np.ndarray
    """Float32: log-probability of each output token, in nats, at the sampling temperature,
    before top-k and top-p; after them if ``mask_ids`` is not None."""
    input_logprobs: np.ndarray
    """Float32: log-probability of each input token but the first, in nats, at temperature 1; empty unless scoring."""
    text: str
    finish_reason: str
    weight_versions: tuple[tuple[str, int, int], ...]
    """(version, start, end): the weights that generated each span of output tokens."""
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Experts of each token but the last, from token ``routes_start`` on, see ``RouteShape.decode``; None if the server
    did not return them."""
    mask_ids: MaskIds | None = None
    """Ids that each output token was sampled from; None if the server did not return them."""


def generate_body(requests: Sequence[GenerationRequest]) -> Json:
    """Return the body of ``POST /generate`` for these sequences."""
    scoring = all(request.max_new_tokens == 0 for request in requests)
    starts = [request.routes_start for request in requests]
    start_len = {"routed_experts_start_len": starts if len(starts) > 1 else starts[0]}
    return {
        "rid": [request.rid for request in requests],
        "input_ids": [request.input_ids for request in requests],
        "sampling_params": [request.sampling_params for request in requests],
        "return_logprob": True,
        "logprob_start_len": 0 if scoring else -1,
        **({"return_routed_experts": True} if any(request.routes for request in requests) else {}),
        **({"return_sampling_mask": True} if any(request.keep_mask for request in requests) else {}),
        **(start_len if any(starts) else {}),
    }


def parse_json(raw: bytes, source: str) -> object:
    """Return the JSON value of an answer.

    Raises:
        BadAnswer: the bytes are not JSON.
    """
    try:
        return from_json(raw)
    except ValueError as error:
        raise BadAnswer(f"{source} answered something that is not JSON: {raw[:80]!r}") from error


def parse_answer(
    raw: bytes, requests: Sequence[GenerationRequest], source: str, version: str | Collection[str] | None = None
) -> list[GenerationResult]:
    """Return one validated result per request from the bytes of an answer; see ``parse_results``."""
    rest, columns = cut_columns(raw, with_routes=any(request.routes for request in requests))
    return parse_results(parse_json(rest, source), requests, source, version, columns)


def parse_results(
    answer: object,
    requests: Sequence[GenerationRequest],
    source: str,
    version: str | Collection[str] | None = None,
    columns: Mapping[str, Column] = NO_COLUMNS,
) -> list[GenerationResult]:
    """Return one validated result per request, in order.

    Args:
        answer: the JSON value of the answer.
        requests: the requests that were sent.
        source: the server's name, for error messages.
        version: the weight version, or the allowed versions, of every token; None allows any.
        columns: the columns that ``cut_columns`` took out of the answer.

    Raises:
        BadAnswer: the answer is incomplete or inconsistent.
        WrongVersion: a token was generated with other weights.
    """
    allowed = (version,) if isinstance(version, str) else version
    if not isinstance(answer, list) or len(answer) != len(requests):
        got = f"{len(answer)} answers" if isinstance(answer, list) else f"a {type(answer).__name__}"
        raise BadAnswer(f"{source} answered {got} to {len(requests)} sequences")
    return [
        _ResultParser(f"{source}, sequence {request.rid!r}", columns).result(entry, request, allowed)
        for entry, request in zip(answer, requests, strict=True)
    ]


class _ResultParser:
    """Validates one answer; every error names the server and the sequence."""

    def __init__(self, where: str, columns: Mapping[str, Column]) -> None:
        self.where, self.columns = where, columns

    def result(self, entry: object, request: GenerationRequest, allowed: Collection[str] | None) -> GenerationResult:
        meta = self.field(entry, "meta_info", dict)
        if self.field(meta, "id", str) != request.rid:
            raise BadAnswer(f"{self.where}: the answer is for {meta['id']!r}")
        output_ids = self.ids(self.numbers(entry, "output_ids", np.ndarray), request.vocabulary)
        finish_reason = self.finish(meta, output_ids, request)
        logprobs = _NONE
        if len(output_ids):
            logprobs = self.logprobs(self.numbers(meta, "output_token_logprobs", LogprobRows), output_ids)
        mask_ids = self.mask_ids(meta, request, output_ids.tolist())
        if mask_ids:
            values = self.field(meta, "output_token_sampling_logprobs", list)
            logprobs = self.logprobs([[*pair] for pair in zip(values, output_ids.tolist(), strict=False)], output_ids)
        versions = self.versions(meta, len(output_ids))
        if allowed is not None and any(v not in allowed for v, _, _ in versions):
            raise WrongVersion(
                f"{self.where}: made with weights {[v for v, _, _ in versions]}, not "
                + " or ".join(map(repr, sorted(allowed)))
            )
        input_logprobs = _NONE
        if request.max_new_tokens == 0:
            entries = self.field(meta, "input_token_logprobs", list)
            input_logprobs = self.logprobs(entries[1:], np.array(request.input_ids[1:], np.int32), stand_in=0)
        text = self.field(entry, "text", str)
        tokens = len(request.input_ids) + len(output_ids) - 1 - request.routes_start
        routes = self.routes(meta, request, tokens)
        return GenerationResult(
            request.rid, output_ids, logprobs, input_logprobs, text, finish_reason, versions, routes, mask_ids
        )

    def mask_ids(self, meta: Json, request: GenerationRequest, output_ids: Sequence[int]) -> MaskIds | None:
        """Return the ids that each output token was sampled from; None if they were not requested or not returned."""
        if not request.keep_mask or (output_ids and meta.get("output_token_sampling_mask") is None):
            return None
        masks = self.field(meta, "output_token_sampling_mask", list) if output_ids else []
        if len(masks) != len(output_ids):
            raise BadAnswer(f"{self.where}: {len(masks)} sampling masks for {len(output_ids)} tokens")
        for position, (mask, token_id) in enumerate(zip(masks, output_ids, strict=True)):
            if not isinstance(mask, list) or not all(type(i) is int and i >= 0 for i in mask) or token_id not in mask:
                raise BadAnswer(
                    f"{self.where}: the sampling mask of output token {position}, id {token_id}, is {str(mask)[:60]}"
                )
        return tuple(map(tuple, masks))

    def routes(self, meta: Json, request: GenerationRequest, tokens: int) -> np.ndarray | None:
        """Return the experts of the tokens but the last, which the model has not processed."""
        if request.routes is None or meta.get("routed_experts") is None:
            return None
        text = self.field(meta, "routed_experts", str)
        try:
            record = self.columns.get(text)
            return request.routes.decode(record if isinstance(record, memoryview) else text, tokens)
        except ValueError as error:
            raise BadAnswer(f"{self.where}: routed_experts of {tokens} tokens: {error}") from error

    def field(self, holder: object, name: str, kind: type[T]) -> T:
        value = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(value, kind):
            raise BadAnswer(f"{self.where}: {name} is {str(value)[:60]!r}, expected a {kind.__name__}")
        return value

    def numbers(self, holder: object, name: str, kind: type[C]) -> C | list[object]:
        """Return a column of numbers; a list if it was not taken out of the answer."""
        value = holder.get(name) if isinstance(holder, dict) else None
        column = self.columns.get(value) if isinstance(value, str) else None
        return column if isinstance(column, kind) else self.field(holder, name, list)

    def finish(self, meta: Json, output_ids: np.ndarray, request: GenerationRequest) -> str:
        finish = self.field(meta, "finish_reason", dict)
        kind, count = finish.get("type"), len(output_ids)
        if kind not in ("stop", "length", "abort"):
            raise BadAnswer(f"{self.where}: finish_reason is {str(finish)[:80]}")
        if meta.get("completion_tokens") != count:
            raise BadAnswer(
                f"{self.where}: {count} output tokens, but completion_tokens is {meta.get('completion_tokens')}"
            )
        # A server may reduce the length to what its context allows; finish_reason then has that length.
        wrong = {
            "stop": not 0 < count <= request.max_new_tokens,
            "length": count != finish.get("length") or count > request.max_new_tokens,
            "abort": count > request.max_new_tokens,
        }
        if wrong[kind]:
            raise BadAnswer(
                f"{self.where}: {count} output tokens of at most {request.max_new_tokens}, finished by {finish}"
            )
        return kind

    def ids(self, values: np.ndarray | Sequence[object], vocabulary: int) -> np.ndarray:
        """Return token ids of the vocabulary as int32."""
        if isinstance(values, np.ndarray):
            ids = values
        else:
            # numpy alone would accept true for 1; a set of types is made without a Python loop.
            try:
                ids = np.array(values if set(map(type, values)) <= {int} else None, np.int64)
            except (OverflowError, TypeError):
                ids = np.array([-1])
        if len(values) and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise BadAnswer(f"{self.where}: output_ids are not all token ids of the model, below {vocabulary}")
        return ids.astype(np.int32)

    def logprobs(
        self, entries: LogprobRows | Sequence[object], ids: np.ndarray, stand_in: int | None = None
    ) -> np.ndarray:
        """Return the log-probs as float32; an entry may have ``stand_in`` instead of the token's id.

        SGLang writes 0 for the id of the vocabulary's last token in an input.
        """
        if len(entries) != len(ids):
            raise BadAnswer(f"{self.where}: {len(entries)} log-probs for {len(ids)} tokens")
        if not len(ids):
            return _NONE
        if isinstance(entries, LogprobRows):
            if (found := _valid_logprobs(entries.logprobs, entries.ids, ids, stand_in)) is not None:
                return found
            entries = entries.to_list()
        if (found := _logprob_column(entries, ids, stand_in)) is not None:
            return found
        position = next(
            i for i in range(len(ids)) if _logprob_column(entries[i : i + 1], ids[i : i + 1], stand_in) is None
        )
        raise BadAnswer(f"{self.where}: log-prob {position} is {entries[position]!r}, for token {ids[position]}")

    def versions(self, meta: Json, count: int) -> tuple[tuple[str, int, int], ...]:
        entries = meta.get("weight_versions")
        if entries is None:  # SGLang before 0.5.23 returns one version for the whole answer
            return ((self.field(meta, "weight_version", str), 0, count),)
        spans = [
            (self.field(e, "version", str), self.field(e, "start", int), self.field(e, "end", int))
            for e in self.field(meta, "weight_versions", list)
        ]
        ends = [0, *(end for _, _, end in spans)]
        if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != count:
            raise BadAnswer(f"{self.where}: weight_versions {spans} do not cover {count} output tokens")
        return tuple(spans)


def _logprob_column(entries: Sequence[object], ids: np.ndarray, stand_in: int | None) -> np.ndarray | None:
    """Return the log-probs of entries [log-prob, token id, ...] as float32; None if an entry is wrong."""
    try:
        values, tokens, *_ = zip(*entries, strict=False)
    except (TypeError, ValueError):
        return None
    if not (set(map(type, values)) <= {float, int} and set(map(type, tokens)) <= {int}):
        return None
    try:
        logprobs, found = np.array(values, np.float64), np.array(tokens, np.int64)
    except OverflowError:
        return None
    return _valid_logprobs(logprobs, found, ids, stand_in)


def _valid_logprobs(
    logprobs: np.ndarray, found: np.ndarray, ids: np.ndarray, stand_in: int | None
) -> np.ndarray | None:
    """Return float64 log-probs as float32; None if one is no log-prob, or is for another token."""
    # Values slightly above 0 are rounding error; anything larger is rejected. The comparisons reject nan too.
    if len(logprobs) != len(ids) or not (logprobs.min() >= _LEAST_LOGPROB and logprobs.max() <= 1e-3):
        return None
    is_same = found == ids
    if stand_in is not None:
        is_same |= found == stand_in
    return logprobs.astype(np.float32) if is_same.all() else None
