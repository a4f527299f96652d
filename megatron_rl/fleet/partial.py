"""Responses in parts: the output up to a push that aborted them, and the rest, requested with that as a prefix.

Legend: T tokens, L layers, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.data.types import fold_seed
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult, Json

Decode = Callable[[Sequence[int]], str]
"""Converts output tokens, without the stop token, to the text that an engine returns."""


class PartialResults:
    """The results of one batch of requests, as far as they have been generated."""

    def __init__(self, requests: Sequence[GenerationRequest], decode: Decode | None = None) -> None:
        self.requests, self.decode = requests, decode
        self._results: list[GenerationResult | None] = [None] * len(requests)

    def remaining(self, suffix: str) -> list[GenerationRequest]:
        """Return requests for what is missing; the suffix makes their ids unique."""
        return [
            replace(_remainder(self.requests[i], self._results[i]), rid=self.requests[i].rid + suffix)
            for i in self._open
        ]

    @property
    def _open(self) -> list[int]:
        return [i for i, result in enumerate(self._results) if result is None or result.finish_reason == "abort"]

    def add(self, answers: Sequence[GenerationResult]) -> list[GenerationResult] | None:
        """Add the answers to the remaining requests; return all results once they are complete."""
        for i, answer in zip(self._open, answers, strict=True):
            head = self._results[i]
            self._results[i] = answer if head is None else join_results(head, answer, self.decode)
        return None if self._open else [result for result in self._results if result is not None]


def _remainder(request: GenerationRequest, head: GenerationResult | None) -> GenerationRequest:
    if head is None or not len(head.output_ids):
        return request
    # A token's random number depends on the seed and its position in the output, so the remainder needs another seed.
    seed = request.sampling_params["sampling_seed"]
    assert isinstance(seed, int), f"{request.rid}: sampling_seed is {seed!r}"
    params = {
        **request.sampling_params,
        "max_new_tokens": request.max_new_tokens - len(head.output_ids),
        "sampling_seed": fold_seed((seed, len(head.output_ids))),
    }
    return continue_request(request, head, params)


def continue_request(request: GenerationRequest, head: GenerationResult, params: Json) -> GenerationRequest:
    """Return the request whose input also has the output so far; routes that are known are not requested again."""
    start = 0 if head.routes is None else len(head.routes)
    ids = (*request.input_ids, *head.output_ids.tolist())
    return replace(request, input_ids=ids, sampling_params=params, routes_start=start)


def join_results(head: GenerationResult, tail: GenerationResult, decode: Decode | None = None) -> GenerationResult:
    """Return two parts of a response as one; every token keeps its log-prob and the version of its weights.

    Without ``decode`` the two texts are concatenated, which breaks a character whose tokens are in both parts.
    """
    output_ids = np.concatenate([head.output_ids, tail.output_ids])
    spans = list(head.weight_versions)
    for version, start, end in tail.weight_versions:
        start, end = start + len(head.output_ids), end + len(head.output_ids)
        if spans and spans[-1][0] == version:
            start = spans.pop()[1]
        spans.append((version, start, end))
    shown = output_ids[:-1] if tail.finish_reason == "stop" else output_ids
    return replace(
        tail,
        rid=head.rid,
        output_ids=output_ids,
        logprobs=np.concatenate([head.logprobs, tail.logprobs]),
        text=head.text + tail.text if decode is None else decode(shown.tolist()),
        weight_versions=tuple(span for span in spans if span[2] > span[1]),
        routes=_join_routes(head.routes, tail.routes),
        mask_ids=None if head.mask_ids is None or tail.mask_ids is None else head.mask_ids + tail.mask_ids,
    )


def _join_routes(head_TLK: np.ndarray | None, tail_TLK: np.ndarray | None) -> np.ndarray | None:
    """Return the experts of each token when it was first processed; the tail's routes begin where the head's end."""
    return None if head_TLK is None or tail_TLK is None else np.concatenate([head_TLK, tail_TLK])
