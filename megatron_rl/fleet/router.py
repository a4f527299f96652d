"""sglang-router 0.3.2 in front of the fleet, for plain generation; control calls go to every server directly.

The router spreads requests, retries elsewhere, and keeps prompts with a common prefix together. It drops fields that it
does not know, routed experts among them: then, and whenever it fails, the fleet sends requests by itself.
"""

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path as FilePath

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import (
    BadAnswer,
    Path,
    Sample,
    SampleRequest,
    generate_body,
    parse_json,
    parse_samples,
)
from megatron_rl.fleet.sglang import own_environment
from megatron_rl.util.ports import free_port

_WORKERS = "/workers"


def router_process(program: str, log_path: FilePath) -> ServerProcess:
    """Return a router, not started yet; ``program`` is its command, ``sglang-router`` of whatever environment."""
    host, port = "127.0.0.1", free_port()
    # Its defaults listen on all interfaces.
    words = ["--host", host, "--port", str(port), "--prometheus-host", host, "--prometheus-port", str(free_port())]
    policy = ["--policy", "cache_aware", "--health-check-interval-secs", "5", "--max-payload-size", str(1 << 30)]
    return ServerProcess([program, "launch", *words, *policy], host, port, log_path, own_environment({}))


class RouterClient(Client):
    """A client of the router: it has no weights of its own, and takes no request of several sequences."""

    async def generate(
        self, requests: Sequence[SampleRequest], version: str | Collection[str] | None = None
    ) -> list[Sample]:
        """See ``Client``; one HTTP request a sequence, all at once."""
        return list(await asyncio.gather(*(self._generate_one(request, version) for request in requests)))

    async def _generate_one(self, request: SampleRequest, version: str | Collection[str] | None) -> Sample:
        body = {
            name: value[0] if isinstance(value, list) else value for name, value in generate_body([request]).items()
        }
        answer = parse_json(await self._ask("POST", Path.GENERATE, body, self.request_timeout_seconds), self.url)
        [sample] = parse_samples([answer], [request], self.url, version)
        return sample

    async def version(self) -> str:
        """Return nothing: the servers behind it are asked themselves."""
        return ""

    async def workers(self) -> dict[str, str]:
        """Return url -> id of the servers that it knows."""
        raw = await self._ask("GET", _WORKERS, None, self.control_timeout_seconds, self.retries)
        answer = parse_json(raw, self.url)
        found = answer.get("workers") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise BadAnswer(f"{self.url}{_WORKERS}: no workers in {raw[:80]!r}")
        return {str(entry["url"]).rstrip("/"): str(entry["id"]) for entry in found if isinstance(entry, dict)}

    async def follow(self, urls: Sequence[str]) -> None:
        """Make these its servers."""
        known = await self.workers()
        for url in set(urls) - known.keys():
            await self._ask("POST", _WORKERS, {"url": url}, self.control_timeout_seconds)
        for url in known.keys() - set(urls):
            await self._ask("DELETE", f"{_WORKERS}/{known[url]}", None, self.control_timeout_seconds)


class Router:
    """The router as a fleet uses it: a member that takes requests while it is well."""

    def __init__(self, server: ServerProcess | str, patience: Timeouts) -> None:
        process = None if isinstance(server, str) else server
        url = server if isinstance(server, str) else server.url
        client = RouterClient(url, patience.request_timeout_seconds, patience.control_timeout_seconds, retries=2)
        self.client, self.member, self.patience = client, Member(client, process), patience
        self._known: frozenset[str] | None = None
        self._following = asyncio.Lock()

    async def follow(self, urls: Sequence[str]) -> None:
        """Give it the servers that have the weights asked for; one that does not listen is left out for a while."""
        async with self._following:
            if not self.member.ready or self._known == frozenset(urls):
                return
            try:
                await self.client.follow(urls)
                self._known = frozenset(urls)
            except RolloutError as error:
                self.member.leave(error, self.patience)

    def serves(self, ready: Sequence[Member], at_once: float) -> bool:
        """Whether it can take one more request for these servers."""
        return self.member.ready and len(ready) > 1 and len(self.member.requests) < at_once * len(ready)

    async def caught_up(self, member: Member) -> None:
        """It has no weights to catch up with, but a new process knows no servers."""
        self._known = None
