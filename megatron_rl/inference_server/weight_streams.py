"""The receiving side of streamed weights: a bucket is received, and passed on to the next server at the same time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

import torch
from aiohttp import StreamReader
from pydantic import TypeAdapter, ValidationError

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.weight_stream import LENGTH_BYTES, GrowingBytes, StreamHeader, stream_bucket
from megatron_rl.inference_server.access import MAX_BODY_BYTES
from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.dtypes import DTYPES
from megatron_rl.weights.flat_bucket import FlatBucket
from megatron_rl.weights.transport import StreamResult

_HEADER = TypeAdapter(StreamHeader)
_MAX_HEADER_BYTES = 64 << 20
ChainResults = Mapping[str, StreamResult]


@contextlib.asynccontextmanager
async def received_bucket(content: StreamReader) -> AsyncIterator[tuple[FlatBucket, "asyncio.Future[ChainResults]"]]:
    """Yield a bucket that has arrived, and the future results of the servers to which it is passed on.

    Raises:
        BadRequest: the header is invalid, or the bucket did not arrive.
    """
    header = await _read_header(content)
    bucket = FlatBucket.empty(header.tensors, torch.device("cpu"))
    data = GrowingBytes(bucket.data.numpy().data)
    relay: asyncio.Future[ChainResults] = asyncio.ensure_future(_pass_on(header, data))
    try:
        await _fill(content, data, header.timeout_seconds)
        yield bucket, relay
    finally:
        relay.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await relay


async def _read_header(content: StreamReader) -> StreamHeader:
    try:
        length = int.from_bytes(await content.readexactly(LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise BadRequest(f"the header has {length} bytes; send at most {_MAX_HEADER_BYTES}")
        header = _HEADER.validate_json(await content.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise BadRequest("the body ends within the header") from error
    except ValidationError as error:
        raise BadRequest(f"the header is invalid: {str(error)[:200]}") from error
    for tensor in header.tensors:
        if tensor.dtype not in DTYPES or min(tensor.shape, default=0) < 0:
            raise BadRequest(f"{tensor.name[:200]} has type {tensor.dtype} and shape {list(tensor.shape)}")
    size = sum(tensor.num_bytes for tensor in header.tensors)
    if size > MAX_BODY_BYTES:
        raise BadRequest(f"the bucket has {size} bytes; send at most {MAX_BODY_BYTES}")
    return header


async def _fill(content: StreamReader, data: GrowingBytes, timeout_seconds: float) -> None:
    """Receive the bytes of a bucket."""
    size = len(data.data)
    while data.available < size:
        try:
            chunk = await asyncio.wait_for(content.readany(), timeout_seconds)
        except TimeoutError as error:
            raise BadRequest(f"nothing of the bucket arrived for {timeout_seconds:.3g} s") from error
        if not chunk or data.available + len(chunk) > size:
            raise BadRequest(f"the bucket has {size} bytes, and {data.available + len(chunk)} were sent")
        data.data[data.available : data.available + len(chunk)] = chunk
        data.grow(len(chunk))


async def _pass_on(header: StreamHeader, data: GrowingBytes) -> ChainResults:
    """Stream the bucket to the rest of the chain; a server that fails is left out of this bucket's chain."""
    if not header.chain:
        return {}
    first, *chain = header.chain
    client = Client(first)
    try:
        return await stream_bucket(client, header.tensors, data, chain, header.timeout_seconds)
    finally:
        await client.close()
