"""Who may use the embedded server, and how long and large a request may be."""

import asyncio
import hmac
import ipaddress
import logging
import resource
import socket
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from megatron_rl.fleet.protocol import Endpoint

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 30
"""Limit of the size of a request. Buckets of weights are the largest ones."""

BODY_SECONDS = 300.0
"""Limit of the time in which the body of a request must arrive."""

FIRST_REQUEST_SECONDS = 10.0
"""Limit of the time in which a new connection must send the header of its first request."""

IDLE_SECONDS = 600.0
"""Limit of the time between two requests of a connection."""


class Refused(Exception):
    """The sender of a request may not use the server, or the request is too large or too slow.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AccessRules:
    """Refuses requests of web pages, and of programs without the key if there is one; closes idle connections."""

    def __init__(self, api_key: str = "", hosts: tuple[str, ...] = ()) -> None:
        """Set the rules.

        Args:
            api_key: key that every request but the health check must have, as ``Authorization: Bearer KEY``.
            hosts: host names, in addition to those of this machine and to addresses, by which the server is reached.
        """
        self.api_key = api_key
        names = {"localhost", socket.gethostname(), socket.getfqdn(), *hosts}
        self.hosts = {name.lower() for name in names}
        self._last_used: dict[object, float] = {}
        """Time of the end of the last request, by connection; infinite during a request."""
        self._opened: dict[object, float] = {}
        """Time when a connection without a request was first seen."""

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check a request, then handle it."""
        connection = request.protocol
        self._last_used[connection] = float("inf")
        try:
            self.check(request)
            return await handler(request)
        finally:
            self._last_used[connection] = time.monotonic()

    def check(self, request: web.Request) -> None:
        """Raise Refused if the sender of a request may not use the server.

        A web page in a browser of this machine can send requests here. Browsers say so in the header Origin; a page
        whose host name was made to resolve to this machine is recognized by the header Host.
        """
        if not self._is_known_host(request.host):
            raise Refused(f"the host {request.host!r} is not this server; use its address", 403)
        if "Origin" in request.headers:
            raise Refused("requests of web pages are refused (header Origin)", 403)
        expected = "application/octet-stream" if request.path == Endpoint.UPDATE_FROM_STREAM else "application/json"
        if request.body_exists and request.content_type != expected:
            raise Refused(f"the content type is {request.content_type}; send {expected}", 415)
        if self.api_key and request.path != Endpoint.HEALTH:
            sent = request.headers.get("Authorization", "")
            if not hmac.compare_digest(sent.encode(errors="replace"), f"Bearer {self.api_key}".encode()):
                raise Refused("send the key of the server: Authorization: Bearer KEY", 401)

    def _is_known_host(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self.hosts
        return True

    async def close_idle_connections(self, server: web.Server, poll_seconds: float = 1.0) -> None:
        """Close connections that send nothing, until this task is cancelled."""
        while True:
            await asyncio.sleep(poll_seconds)
            now, connections = time.monotonic(), server.connections
            for times in (self._last_used, self._opened):
                for closed in times.keys() - set(connections):
                    del times[closed]
            for connection in connections:
                since = self._last_used.get(connection)
                limit = FIRST_REQUEST_SECONDS if since is None else IDLE_SECONDS
                if now - (self._opened.setdefault(connection, now) if since is None else since) > limit:
                    connection.force_close()


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: it is too large, or does not arrive in time.
    """
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise Refused(f"the body has {request.content_length} bytes; send at most {MAX_BODY_BYTES}", 413)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(f"the body has more than {MAX_BODY_BYTES} bytes", 413)
    except TimeoutError as error:
        raise Refused(f"the body did not arrive in {BODY_SECONDS:g} s", 408) from error
    return bytes(body)


def raise_connection_limit() -> None:
    """Allow as many open connections as this user may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def warn_if_public(host: str, api_key: str) -> None:
    """Warn if other machines can reach a server that asks for no key."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not api_key:
        log.warning(
            "everyone who reaches %s can sample and change the weights; give --api-key, or --host 127.0.0.1", host
        )
