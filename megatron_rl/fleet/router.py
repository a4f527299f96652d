"""sglang-router 0.3.2 in front of the servers, for plain generation; control calls go to each server directly.

The router balances requests, retries on other servers, and sends prompts with a common prefix to one server. It drops
fields that it does not know, such as routed experts. For those, and when the router fails, the fleet chooses servers.
"""

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import (
    BadAnswer,
    Endpoint,
    GenerationRequest,
    GenerationResult,
    generate_body,
    parse_json,
    parse_results,
)
from megatron_rl.fleet.sglang import server_environment
from megatron_rl.util.ports import free_port

_WORKERS = "/workers"


def router_process(program: str, log_path: Path) -> ServerProcess:
    """Return a router that is not started yet; ``program`` is the path of the ``sglang-router`` command."""
    host, port = "127.0.0.1", free_port()
    # The defaults listen on all interfaces.
    address = ["--host", host, "--port", str(port), "--prometheus-host", host, "--prometheus-port", str(free_port())]
    policy = ["--policy", "cache_aware", "--health-check-interval-secs", "5", "--max-payload-size", str(1 << 30)]
    return ServerProcess([program, "launch", *address, *policy], host, port, log_path, server_environment({}))


class RouterClient(Client):
    """Client of the router, which has no weights and accepts one sequence per request."""

    health_is_progress: ClassVar[bool] = False

    async def generate(
        self, requests: Sequence[GenerationRequest], version: str | Collection[str] | None = None
    ) -> list[GenerationResult]:
        """Sample or score these sequences, with one concurrent HTTP request per sequence."""
        return list(await asyncio.gather(*(self._generate_one(request, version) for request in requests)))

    async def _generate_one(
        self, request: GenerationRequest, version: str | Collection[str] | None
    ) -> GenerationResult:
        body = {
            name: value[0] if isinstance(value, list) else value for name, value in generate_body([request]).items()
        }
        answer = parse_json(
            await self._request("POST", Endpoint.GENERATE, body, self.request_timeout_seconds), self.url
        )
        [result] = parse_results([answer], [request], self.url, version)
        return result

    async def version(self) -> str:
        """Return an empty version: the router has no weights."""
        return ""

    async def workers(self) -> dict[str, str]:
        """Return the router's servers as url -> id."""
        raw = await self._request("GET", _WORKERS, None, self.control_timeout_seconds, self.retries)
        answer = parse_json(raw, self.url)
        found = answer.get("workers") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise BadAnswer(f"{self.url}{_WORKERS}: no workers in {raw[:80]!r}")
        return {str(entry["url"]).rstrip("/"): str(entry["id"]) for entry in found if isinstance(entry, dict)}

    async def set_workers(self, urls: Sequence[str]) -> None:
        """Replace the router's servers by these."""
        known = await self.workers()
        for url in set(urls) - known.keys():
            await self._request("POST", _WORKERS, {"url": url}, self.control_timeout_seconds)
        for url in known.keys() - set(urls):
            await self._request("DELETE", f"{_WORKERS}/{known[url]}", None, self.control_timeout_seconds)


class Router:
    """The router as a member of the fleet that takes requests while it is healthy."""

    def __init__(self, server: ServerProcess | str, timeouts: Timeouts) -> None:
        process = None if isinstance(server, str) else server
        url = server if isinstance(server, str) else server.url
        client = RouterClient(url, None, timeouts.control_timeout_seconds, retries=2)
        self.client, self.member, self.timeouts = client, Member(client, process, timeouts=timeouts), timeouts
        self._workers: frozenset[str] | None = None
        self._lock = asyncio.Lock()

    async def set_workers(self, urls: Sequence[str]) -> None:
        """Make the router use the servers that have the requested weights; a router that fails leaves the fleet."""
        async with self._lock:
            if not self.member.ready or self._workers == frozenset(urls):
                return
            try:
                await self.client.set_workers(urls)
                self._workers = frozenset(urls)
            except RolloutError as error:
                self.member.leave(error, self.timeouts)

    def has_room(self, ready: Sequence[Member], sequences: int, sequences_per_server: int) -> bool:
        """Return whether the router can take so many more sequences for these servers."""
        member = self.member
        return member.ready and len(ready) > 1 and member.has_room(sequences, sequences_per_server * len(ready))

    async def catch_up(self, member: Member) -> None:
        """Note that a restarted router does not know the servers; it has no weights to catch up with."""
        self._workers = None
