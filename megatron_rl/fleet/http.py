"""HTTP to one inference server: generation, without torch, so that a receiver process starts fast and stays small."""

import asyncio
import os
from collections.abc import AsyncIterable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import ClassVar

import aiohttp

from megatron_rl.fleet.protocol import (
    API_KEY,
    Endpoint,
    GenerationRequest,
    GenerationResult,
    Json,
    RequestRefused,
    ServerTimeout,
    ServerUnreachable,
    generate_body,
    parse_answer,
)

_RETRY_SECONDS = 0.2
BUSY_STATUS_CODES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
"""Status codes, in addition to those from 500 on, of a server that may answer later: proxies send them too."""


class HttpClient:
    """Client of one server that speaks SGLang's API; use it from one event loop.

    Args:
        url: the server's address.
        request_timeout_seconds: time limit of a generation request; None: no limit.
        control_timeout_seconds: time limit of a control call.
        retries: how often an idempotent control call without an answer is repeated.
    """

    api: ClassVar[str] = "sglang"
    """Whose API the server speaks; tells a receiver which client to use."""
    health_is_progress: ClassVar[bool] = True
    """Whether a passed health check of a busy server shows that it generates tokens."""

    def __init__(
        self,
        url: str,
        request_timeout_seconds: float | None = 600.0,
        control_timeout_seconds: float = 120.0,
        retries: int = 0,
    ) -> None:
        self.url = url.rstrip("/")
        self.request_timeout_seconds = request_timeout_seconds
        self.control_timeout_seconds = control_timeout_seconds
        self.retries = retries
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self, requests: Sequence[GenerationRequest], version: str | Collection[str] | None = None
    ) -> list[GenerationResult]:
        """Sample or score these sequences in one request; ``parse_answer`` validates the answer."""
        raw = await self._request("POST", Endpoint.GENERATE, generate_body(requests), self.request_timeout_seconds)
        return parse_answer(raw, requests, self.url, version)

    async def _request(
        self, method: str, path: str, body: Json | None, timeout_seconds: float | None, retries: int = 0
    ) -> bytes:
        for attempt in range(retries + 1):
            try:
                return await self._request_once(method, path, body, timeout_seconds)
            except ServerUnreachable as error:
                if attempt == retries or isinstance(error, ServerTimeout):
                    raise
                await asyncio.sleep(_RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    async def post_bytes(self, path: str, body: AsyncIterable[bytes | memoryview], size: int) -> bytes:
        """Post a body of ``size`` bytes that is produced while it is sent; return the answer, without a time limit."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        return await self._exchange("POST", path, None, data=body, headers=headers)

    async def _request_once(self, method: str, path: str, body: Json | None, timeout_seconds: float | None) -> bytes:
        return await self._exchange(method, path, timeout_seconds, json=body)

    async def _exchange(
        self,
        method: str,
        path: str,
        timeout_seconds: float | None,
        *,
        json: Json | None = None,
        data: AsyncIterable[bytes | memoryview] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._open_session().request(
                method, self.url + path, json=json, data=data, headers=headers, timeout=timeout
            ) as response:
                raw = await response.read()
        except TimeoutError as error:
            raise ServerTimeout(f"{self.url}{path} did not answer within {timeout_seconds} s") from error
        except aiohttp.ClientError as error:
            raise ServerUnreachable(f"{self.url}{path} broke off: {error or type(error).__name__}") from error
        if response.status >= 500 or response.status in BUSY_STATUS_CODES:
            raise ServerUnreachable(f"{self.url}{path} answered {response.status}: {raw[:300]!r}")
        if response.status >= 400:
            raise RequestRefused(
                f"{self.url}{path} refused with {response.status}: {raw[:500].decode(errors='replace')}"
            )
        return raw

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A pooled connection that the server has just closed would look like a dead server, so connections are not
            # reused. Their number is not limited: the fleet limits the requests per server.
            key = os.environ.get(API_KEY)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        return self._session
