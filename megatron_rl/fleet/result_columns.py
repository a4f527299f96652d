"""Requests and results as messages between the fleet and a receiver: numbers as JSON, columns as bytes.

request:  {"id": 7, "api": "sglang", "url": ..., "requests": [...], "versions": ["3"]}
          {"cancel": 7} or {"ping": true}, which is sent back
answer:   {"id": 7, "results": [...]} and the columns, or {"id": 7, "error": "BadAnswer", "message": ...}
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_rl.data.routes import RouteShape
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult

Json = Mapping[str, Any]
_EMPTY = np.empty(0, np.float32)
_ALIGNMENT = 8


def request_to_json(request: GenerationRequest) -> Json:
    """Return a request as JSON."""
    routes = None if request.routes is None else asdict(request.routes)
    return {**vars(request), "routes": routes}


def request_from_json(fields: Json) -> GenerationRequest:
    """Return the request that ``request_to_json`` encoded."""
    values: dict[str, Any] = {**fields, "input_ids": tuple(fields["input_ids"])}
    if values["routes"] is not None:
        shape: dict[str, Any] = {**values["routes"], "layers": tuple(values["routes"]["layers"])}
        values["routes"] = RouteShape(**shape)
    return GenerationRequest(**values)


def encode_results(results: Sequence[GenerationResult]) -> tuple[list[Json], list[memoryview]]:
    """Return results as JSON without their columns, and the bytes of the columns, each padded to 8 bytes."""
    entries: list[Json] = []
    columns: list[memoryview] = []
    for result in results:
        arrays = _arrays(result)
        bare = replace(result, output_ids=_EMPTY, logprobs=_EMPTY, input_logprobs=_EMPTY, text="", routes=None)
        shapes = {name: [array.dtype.name, array.shape] for name, array in arrays.items()}
        fields = {name: value for name, value in vars(bare).items() if name not in _COLUMNS}
        entries.append({**fields, "columns": shapes})
        for array in arrays.values():
            columns.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            columns.append(memoryview(bytes(-array.nbytes % _ALIGNMENT)))
    return entries, columns


def decode_results(entries: Sequence[Json], data: bytearray | mmap.mmap) -> list[GenerationResult]:
    """Return the results of ``encode_results``; their arrays are views of the data."""
    return list(_decoded(entries, data))


_COLUMNS = ("output_ids", "logprobs", "input_logprobs", "routes")


def _arrays(result: GenerationResult) -> Mapping[str, np.ndarray]:
    found = {name: getattr(result, name) for name in _COLUMNS}
    # The text is often most of the rest, and as bytes it need not be escaped and parsed.
    text = np.frombuffer(result.text.encode("utf-8", "surrogatepass"), np.uint8)
    return {name: array for name, array in found.items() if array is not None} | {"text": text}


def _decoded(entries: Sequence[Json], data: bytearray | mmap.mmap) -> Iterator[GenerationResult]:
    start = 0
    for entry in entries:
        arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in entry["columns"].items():
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape) if count else np.empty(shape, dtype)
            start += -(-arrays[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        versions = tuple((version, first, end) for version, first, end in entry["weight_versions"])
        fields: dict[str, Any] = {name: value for name, value in entry.items() if name != "columns"}
        if fields["mask_ids"] is not None:
            fields["mask_ids"] = tuple(map(tuple, fields["mask_ids"]))
        text = str(arrays.pop("text").data, "utf-8", "surrogatepass")
        fields |= {"weight_versions": versions, **arrays, "text": text}
        yield GenerationResult(**fields)
