"""A bucket of weights as the body of an HTTP request, which servers pass on while they receive it.

    body:   8 bytes: length of the header | header, JSON: tensors, chain, timeout | the tensors' bytes
    answer: {"error": why this server refuses the bucket, or null, "chain": {url: [class of the error, message], ...}}

A receiver passes on what it has of the bucket, also if it refuses the bucket itself; a next server that does not read
or answer is left out, and those behind it have missed the bucket. Timeouts are by progress and shrink along the chain,
so that the server before the one that hangs notices it first.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.protocol import BadAnswer, Endpoint, RequestRefused, ServerTimeout, ServerUnreachable
from megatron_rl.weights.flat_bucket import TensorHeader
from megatron_rl.weights.transport import StreamResult

LENGTH_BYTES = 8
_CHUNK_BYTES = 256 << 10
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class StreamHeader:
    """What comes before the bytes of a bucket."""

    tensors: list[TensorHeader]
    chain: list[str]
    """The servers behind this one."""
    timeout_seconds: float
    """Limit for a pause between two pieces."""

    def encoded(self) -> bytes:
        """Return the header with its length."""
        text = json.dumps(asdict(self)).encode()
        return len(text).to_bytes(LENGTH_BYTES, "little") + text


@dataclass(eq=False)
class GrowingBytes:
    """The bytes of a bucket, of which the first ``available`` have arrived."""

    data: memoryview
    available: int = 0
    is_awaited: bool = False
    """Whether a reader waits for bytes that have not arrived."""
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def complete(cls, data: memoryview) -> "GrowingBytes":
        """Return bytes that have all arrived."""
        return cls(data, len(data))

    def grow(self, count: int) -> None:
        """Make more bytes available."""
        self.available += count
        self._grown.set()

    async def chunks(self) -> AsyncIterator[memoryview]:
        """Yield the bytes in pieces as they arrive; for one reader."""
        start = 0
        while start < len(self.data):
            while start == self.available:
                self._grown.clear()
                self.is_awaited = True
                await self._grown.wait()
            self.is_awaited = False
            stop = min(self.available, start + _CHUNK_BYTES)
            yield self.data[start:stop]
            start = stop


async def stream_bucket(
    client: HttpClient,
    tensors: Sequence[TensorHeader],
    data: GrowingBytes,
    chain: Sequence[str],
    timeout_seconds: float,
) -> dict[str, StreamResult]:
    """Stream a bucket to a server; return the result of it and of every server of the chain."""
    header = StreamHeader(list(tensors), list(chain), timeout_seconds * (1 + len(chain)) / (2 + len(chain)))
    missed = {url: StreamResult(is_missed=True) for url in chain}
    try:
        raw = await _post(client, header, data, timeout_seconds)
    except RolloutError as error:
        return {client.url: StreamResult(error), **missed}
    try:
        answer = _ANSWER.validate_json(raw)
    except ValidationError as error:
        return {client.url: StreamResult(BadAnswer(f"{client.url}: {raw[:80]!r} is no answer: {error}")), **missed}
    refused = None if answer.error is None else RequestRefused(f"{client.url} refused a bucket: {answer.error}")
    return {client.url: StreamResult(refused), **missed, **results_from_json(answer.chain)}


@dataclass(frozen=True)
class _Answer:
    error: str | None
    chain: dict[str, tuple[str, str]]


_ANSWER = TypeAdapter(_Answer)
_MISSED = "missed"
_KINDS = {kind.__name__: kind for kind in (RequestRefused, ServerTimeout, ServerUnreachable, BadAnswer)}


def results_to_json(results: Mapping[str, StreamResult]) -> dict[str, tuple[str, str]]:
    """Return the results of servers as JSON; url -> (class of the error, message), empty for success."""
    return {
        url: (_MISSED if result.is_missed else type(result.error).__name__ if result.error else "", str(result.error))
        for url, result in results.items()
    }


def results_from_json(results: Mapping[str, tuple[str, str]]) -> dict[str, StreamResult]:
    """Return the results that ``results_to_json`` encoded."""
    return {
        url: StreamResult(
            _KINDS.get(kind, RolloutError)(message) if kind not in ("", _MISSED) else None, kind == _MISSED
        )
        for url, (kind, message) in results.items()
    }


async def _post(client: HttpClient, header: StreamHeader, data: GrowingBytes, timeout_seconds: float) -> bytes:
    """Send a bucket and return the answer; the time in which the bytes themselves have not arrived does not count."""
    progress = 0
    encoded = header.encoded()

    async def body() -> AsyncIterator[bytes | memoryview]:
        nonlocal progress
        yield encoded
        async for chunk in data.chunks():
            yield chunk
            progress += 1

    size = len(encoded) + len(data.data)
    request = asyncio.ensure_future(client.post_bytes(Endpoint.UPDATE_FROM_STREAM, body(), size))
    seen, silent_seconds = 0, 0.0
    try:
        while not request.done():
            await asyncio.wait([request], timeout=min(_POLL_SECONDS, timeout_seconds))
            silent_seconds = 0.0 if progress != seen or data.is_awaited else silent_seconds + _POLL_SECONDS
            seen = progress
            if silent_seconds > timeout_seconds and not request.done():
                raise ServerTimeout(f"{client.url} took nothing of a bucket for {timeout_seconds:.3g} s")
        return request.result()
    finally:
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError, RolloutError):
            await request
