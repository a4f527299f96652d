"""HTTP client of one inference server: sends requests, waits, and validates the answers."""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Literal

import aiohttp
from pydantic import TypeAdapter, ValidationError

from megatron_rl.fleet.protocol import (
    API_KEY,
    BadAnswer,
    Endpoint,
    GenerationRequest,
    GenerationResult,
    Json,
    RequestRefused,
    ServerTimeout,
    ServerUnreachable,
    generate_body,
    parse_json,
    parse_results,
)
from megatron_rl.weights.shared_memory import Handle, MemoryLocation, TensorSlice
from megatron_rl.weights.transport import TensorHeader

_RETRY_SECONDS = 0.2

BUSY_STATUS_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Status codes, in addition to those from 500 on, of a server that may answer later: proxies send them too."""


class Client:
    """Client of one server that speaks SGLang's API; use it from one event loop. It implements ``WeightServer``."""

    def __init__(
        self,
        url: str,
        request_timeout_seconds: float = 600.0,
        control_timeout_seconds: float = 120.0,
        retries: int = 0,
    ) -> None:
        self.url = url.rstrip("/")
        self.request_timeout_seconds = request_timeout_seconds
        self.control_timeout_seconds = control_timeout_seconds
        self.retries = retries
        """How often an idempotent control call without an answer is repeated."""
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self, requests: Sequence[GenerationRequest], version: str | Collection[str] | None = None
    ) -> list[GenerationResult]:
        """Sample or score these sequences in one request; ``parse_results`` validates the answer."""
        raw = await self._request("POST", Endpoint.GENERATE, generate_body(requests), self.request_timeout_seconds)
        return parse_results(parse_json(raw, self.url), requests, self.url, version)

    async def healthy(self, timeout_seconds: float) -> bool:
        """Return whether the server answers its health check."""
        try:
            await self._request("GET", Endpoint.HEALTH, None, timeout_seconds)
        except (ServerUnreachable, RequestRefused):
            return False
        return True

    async def version(self) -> str:
        """Return the version of the server's weights."""
        info = await self._json("GET", Endpoint.MODEL_INFO)
        if not isinstance(info.get("weight_version"), str):
            raise BadAnswer(f"{self.url}{Endpoint.MODEL_INFO}: weight_version is {info.get('weight_version')!r}")
        return str(info["weight_version"])

    async def server_info(self) -> Json:
        """Return the server's description of itself."""
        return await self._json("GET", Endpoint.SERVER_INFO)

    async def pause(self, mode: Literal["abort", "retract", "in_place"], timeout_seconds: float | None = None) -> None:
        """Stop decoding until ``resume``; the mode says what happens to running requests."""
        timeout = self.control_timeout_seconds if timeout_seconds is None else timeout_seconds
        await self._request("POST", Endpoint.PAUSE, {"mode": mode}, timeout, self.retries)

    async def resume(self) -> None:
        """Continue decoding."""
        await self._control(Endpoint.CONTINUE, {})

    async def flush(self) -> None:
        """Empty the server's prefix cache."""
        await self._control(Endpoint.FLUSH, {})

    async def abort(self, rid: str | None) -> None:
        """Abort one sequence by its id, or all sequences."""
        await self._control(Endpoint.ABORT, {"abort_all": True} if rid is None else {"rid": rid})

    async def begin_update(self) -> None:
        """Open a weight update."""
        await self._control(Endpoint.BEGIN_UPDATE, {})

    async def update_from_tensor(self, payload: str) -> None:
        """Send one bucket of a weight update."""
        await self._control(
            Endpoint.UPDATE_FROM_TENSOR, {"serialized_named_tensors": [payload], "flush_cache": False}, retries=0
        )

    async def tensor_parallel(self) -> int:
        """Return the number of ranks that share the server's model."""
        return int(str((await self.server_info()).get("tp_size") or 1))

    async def join_group(self, host: str, port: int, size: int, name: str, backend: str) -> None:
        """Make the server join a group as ranks 1 and up; rank 0 has the store at this address."""
        body = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size}
        await self._control(Endpoint.JOIN_GROUP, {**body, "group_name": name, "backend": backend}, retries=0)

    async def update_from_distributed(self, tensors: Sequence[TensorHeader], group: str) -> None:
        """Make the server receive one bucket that is broadcast in the group."""
        body = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "group_name": group,
            "flush_cache": False,
        }
        await self._control(Endpoint.UPDATE_FROM_DISTRIBUTED, body, retries=0)

    async def leave_group(self, name: str) -> None:
        """Make the server leave a group."""
        await self._control(Endpoint.LEAVE_GROUP, {"group_name": name}, retries=0)

    async def memory_location(self) -> MemoryLocation | None:
        """Return where the server runs; None if it does not receive weights through shared memory."""
        location = (await self.server_info()).get("memory_location")
        if location is None:
            return None
        try:
            return TypeAdapter(MemoryLocation).validate_python(location)
        except ValidationError as error:
            raise BadAnswer(f"{self.url}{Endpoint.SERVER_INFO}: memory_location is {str(location)[:80]}") from error

    async def update_from_handle(self, handle: Handle, slices: Sequence[TensorSlice]) -> None:
        """Make the server copy slices of tensors from a shared buffer."""
        body = {"handle": asdict(handle), "slices": [asdict(entry) for entry in slices]}
        await self._control(Endpoint.UPDATE_FROM_HANDLE, body, retries=0)

    async def end_update(self) -> None:
        """Close a weight update and apply the new weights."""
        await self._control(Endpoint.END_UPDATE, {}, retries=0)

    async def update_from_disk(self, folder: str) -> None:
        """Make the server load its weights from a folder that it can read."""
        await self._control(Endpoint.UPDATE_FROM_DISK, {"model_path": folder})

    async def set_version(self, version: str) -> None:
        """Set the version of the server's weights."""
        await self._control(Endpoint.UPDATE_VERSION, {"new_version": version, "abort_all_requests": False})

    async def checksums(self, algorithm: str = "sha256") -> tuple[str, Mapping[str, str]]:
        """Return the algorithm and the checksum of each tensor by the server's names.

        Only the embedded server computes the requested algorithm. The returned one is empty if it is unknown.
        """
        option = {} if algorithm == "sha256" else {"algorithm": algorithm}  # SGLang does not have this field
        answer = await self._json("POST", Endpoint.WEIGHTS_CHECKER, {"action": "checksum", **option})
        ranks = answer.get("ranks")
        merged: dict[str, str] = {}
        for rank, entry in enumerate(ranks if isinstance(ranks, list) else []):
            sums = entry.get("checksums") if isinstance(entry, dict) else None
            if not isinstance(sums, dict):
                raise BadAnswer(
                    f"{self.url}{Endpoint.WEIGHTS_CHECKER}: rank {rank} has no checksums: {str(entry)[:80]}"
                )
            merged |= {(f"{rank}:{name}" if rank else name): str(value) for name, value in sums.items()}
        if not merged or not isinstance(ranks, list):
            raise BadAnswer(f"{self.url}{Endpoint.WEIGHTS_CHECKER}: no checksums in {str(answer)[:80]}")
        if "algorithm" not in answer and len(ranks) == 1 and (await self.server_info()).get("device") == "cpu":
            # SGLang does not name its algorithm, which differs on GPUs; each of several ranks has a shard.
            return "sha256/8", merged
        return str(answer.get("algorithm", "")), merged

    async def _control(self, path: Endpoint, body: Json, retries: int | None = None) -> None:
        await self._request(
            "POST", path, body, self.control_timeout_seconds, self.retries if retries is None else retries
        )

    async def _json(self, method: str, path: str, body: Json | None = None) -> Json:
        answer = parse_json(
            await self._request(method, path, body, self.control_timeout_seconds, self.retries), self.url
        )
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}{path} answered a {type(answer).__name__}, expected an object")
        return answer

    async def _request(
        self, method: str, path: str, body: Json | None, timeout_seconds: float, retries: int = 0
    ) -> bytes:
        for attempt in range(retries + 1):
            try:
                return await self._request_once(method, path, body, timeout_seconds)
            except ServerUnreachable as error:
                if attempt == retries or isinstance(error, ServerTimeout):
                    raise
                await asyncio.sleep(_RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    async def _request_once(self, method: str, path: str, body: Json | None, timeout_seconds: float) -> bytes:
        if self._session is None:
            # A pooled connection that the server has just closed would look like a dead server, so connections are not
            # reused. Their number is not limited: the fleet limits the requests per server.
            key = os.environ.get(API_KEY)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                raw = await response.read()
        except TimeoutError as error:
            raise ServerTimeout(f"{self.url}{path} did not answer within {timeout_seconds:g} s") from error
        except aiohttp.ClientError as error:
            raise ServerUnreachable(f"{self.url}{path} broke off: {error or type(error).__name__}") from error
        if response.status >= 500 or response.status in BUSY_STATUS_CODES:
            raise ServerUnreachable(f"{self.url}{path} answered {response.status}: {raw[:300]!r}")
        if response.status >= 400:
            raise RequestRefused(
                f"{self.url}{path} refused with {response.status}: {raw[:500].decode(errors='replace')}"
            )
        return raw
