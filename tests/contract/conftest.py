"""One suite, many servers: every test gets a server that speaks the protocol, and does not know which."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.members import Member, Patience, wait_until_healthy
from megatron_rl.rollout.process import embedded_server
from tests.rollout import tiny

ENGINES = ("embedded",)
"""Engines under contract; the recorded replay and the real SGLang join here."""


@dataclass
class Contract:
    """A running server and what is known of it."""

    engine: str
    url: str
    model: Path
    vocabulary: int = tiny.VOCABULARY
    context: int = 256
    repeats: bool = field(default=True)
    """Equal requests with equal seeds are answered equally."""

    def ask(self, path: str, body: Mapping[str, object] | None = None, method: str = "POST") -> tuple[int, str]:
        """Return status and text of an answer."""
        return asyncio.run(self.ask_async(path, body, method))

    async def ask_async(
        self, path: str, body: Mapping[str, object] | None = None, method: str = "POST"
    ) -> tuple[int, str]:
        """Return status and text of an answer."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, json=body) as response,
        ):
            return response.status, await response.text()

    def json(self, path: str, body: Mapping[str, object] | None = None, method: str = "POST") -> dict[str, Any]:
        """Return a good answer."""
        status, text = self.ask(path, body, method)
        assert status == 200, f"{path} answered {status}: {text}"
        return json.loads(text)


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    folder = tmp_path_factory.mktemp("contract")
    model = tiny.save("qwen3_moe", folder / "model")
    process = embedded_server(str(model), folder / "log")
    process.start()
    try:

        async def wait() -> None:
            member = Member(Client(process.url), process)
            await wait_until_healthy(member, Patience(start_timeout_seconds=120))
            await member.client.close()

        asyncio.run(wait())
        yield Contract(request.param, process.url, model)
    finally:
        process.stop()


@pytest.fixture(autouse=True)
def _leave_it_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that paused the server lets it go on, whatever else happened."""
    yield
    request.getfixturevalue("server").ask("/continue_generation", {})
