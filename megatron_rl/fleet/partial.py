"""Responses in pieces: what a server had of them when it ended them, and the rest, asked for with that as a prefix."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.data.types import fold_seed
from megatron_rl.fleet.protocol import Sample, SampleRequest

Decode = Callable[[Sequence[int]], str]
"""From output tokens, without the stop token, to the text that an engine answers with."""


class Pieces:
    """The sequences of one request, each as far as it has come."""

    def __init__(self, requests: Sequence[SampleRequest], decode: Decode | None = None) -> None:
        self.requests, self.decode = requests, decode
        self._samples: list[Sample | None] = [None] * len(requests)

    def missing(self, name: str) -> list[SampleRequest]:
        """Return what to ask for; ids end in the name, so that none is used twice."""
        return [replace(_rest(self.requests[i], self._samples[i]), rid=self.requests[i].rid + name) for i in self._open]

    @property
    def _open(self) -> list[int]:
        return [i for i, sample in enumerate(self._samples) if sample is None or sample.finish_reason == "abort"]

    def add(self, answers: Sequence[Sample]) -> list[Sample] | None:
        """Take the answers to what was missing; return all samples once they are whole."""
        for i, answer in zip(self._open, answers, strict=True):
            head = self._samples[i]
            self._samples[i] = answer if head is None else joined(head, answer, self.decode)
        return None if self._open else [sample for sample in self._samples if sample is not None]


def _rest(request: SampleRequest, head: Sample | None) -> SampleRequest:
    if head is None or not head.output_ids:
        return request
    # The draw of a token depends on the seed and on how many tokens came before: the rest needs a seed of its own.
    seed = request.sampling_params["sampling_seed"]
    assert isinstance(seed, int), f"{request.rid}: sampling_seed is {seed!r}"
    params = {
        **request.sampling_params,
        "max_new_tokens": request.max_new_tokens - len(head.output_ids),
        "sampling_seed": fold_seed((seed, len(head.output_ids))),
    }
    return SampleRequest(request.rid, request.input_ids + head.output_ids, params, request.routes)


def joined(head: Sample, tail: Sample, decode: Decode | None = None) -> Sample:
    """Return two pieces as one; every token keeps its log-prob and the version of the weights that made it.

    Without ``decode`` the texts are put together as they are, which cuts a character whose tokens lie in both.
    """
    output_ids = head.output_ids + tail.output_ids
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
        logprobs=head.logprobs + tail.logprobs,
        text=head.text + tail.text if decode is None else decode(shown),
        weight_versions=tuple(span for span in spans if span[2] > span[1]),
        routes=_routes(head.routes, tail.routes),
    )


def _routes(head_TLE: np.ndarray | None, tail_TLE: np.ndarray | None) -> np.ndarray | None:
    """Return the experts that tokens took when they were first read: the tail's record begins with the prompt again."""
    if head_TLE is None or tail_TLE is None:
        return None
    return np.concatenate([head_TLE, tail_TLE[len(head_TLE) :]])
