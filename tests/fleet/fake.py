"""Servers without a model: they speak the protocol, and misbehave on demand. Each runs on a thread of its own."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.protocol import Endpoint

Answer = dict[str, object]
Trick = Callable[[list[dict[str, Any]]], object]


class FakeServer:
    """Answers every sequence with tokens that follow from its seed.

    Attributes:
        trick: changes the answers of ``/generate`` before they are sent; may return text to send instead.
        status: of ``/generate``.
        delay_seconds: before an answer of ``/generate``.
        hangs: nothing is answered at all while it is set.
        logprob: of every token, sampled or read.
        checksum: of its one tensor.
        tensor: name of its one tensor.
        info: answer of ``/server_info``, in addition.
        breaks: the connection of ``/generate`` is closed in the middle of a request while it is set.
    """

    def __init__(self, version: str = "0") -> None:
        self.version = version
        self.trick: Trick = lambda answers: None
        self.status = 200
        self.delay_seconds = 0.0
        self.logprob = -0.25
        self.hangs = False
        self.checksum = "same everywhere"
        self.breaks = False
        self.info: dict[str, object] = {}
        self.tensor = "t"
        self.calls: Counter[str] = Counter()
        self.rows: list[str] = []
        self.url = ""

    def application(self) -> web.Application:
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.Response:
        self.calls[request.path] += 1
        while self.hangs:
            await asyncio.sleep(0.02)
        body = json.loads(await request.read() or b"{}")
        if request.path == Endpoint.GENERATE and self.breaks and request.transport is not None:
            request.transport.close()
        if request.path == Endpoint.GENERATE:
            return await self.generate(body)
        if request.path == Endpoint.UPDATE_VERSION:
            self.version = body["new_version"]
        checksums = {"checksums": {self.tensor: self.checksum}}
        info = self.info if request.path == Endpoint.SERVER_INFO else {}
        return web.json_response({"success": True, "weight_version": self.version, "ranks": [checksums], **info})

    async def generate(self, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(self.delay_seconds)
        if isinstance(body["rid"], str):  # one sequence, as through a router
            self.rows.append(body["rid"])
            answer = self.sample(body["rid"], body["input_ids"], body["sampling_params"])
            return web.json_response(answer, status=self.status)
        rows = zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True)
        answers = [self.sample(*row) for row in rows]
        instead = self.trick(answers)
        if instead is not None:
            return web.Response(text=str(instead), status=self.status)
        self.rows += body["rid"]
        return web.json_response(answers, status=self.status)

    def sample(self, rid: str, input_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        count = params["max_new_tokens"]
        ids = [(params["sampling_seed"] + i) % 97 for i in range(count)]
        return {
            "text": "",
            "output_ids": ids,
            "meta_info": {
                "id": rid,
                "finish_reason": {"type": "length", "length": count},
                "completion_tokens": count,
                "weight_version": self.version,
                "weight_versions": [{"version": self.version, "start": 0, "end": count}],
                "output_token_logprobs": [[self.logprob, i, None] for i in ids],
                **({} if count else {"input_token_logprobs": [[self.logprob, i, None] for i in input_ids]}),
            },
        }


def garbage(answers: list[dict[str, Any]]) -> object:
    return "<html>502 Bad Gateway</html>"


def too_long(answers: list[dict[str, Any]]) -> object:
    return '{"error": {"message": "the prompt is too long"}}'


def foreign_token(answers: list[dict[str, Any]]) -> object:
    """Answer with a token that a model of 97 tokens lacks."""
    answers[0]["output_ids"][0] = answers[0]["meta_info"]["output_token_logprobs"][0][1] = 97
    return None


def too_few_tokens(answers: list[dict[str, Any]]) -> object:
    answers[0]["output_ids"].pop()
    return None


def nan_logprobs(answers: list[dict[str, Any]]) -> object:
    answers[-1]["meta_info"]["output_token_logprobs"][0][0] = math.nan
    return None


def wrong_version(answers: list[dict[str, Any]]) -> object:
    answers[0]["meta_info"]["weight_versions"][0]["version"] = "7"
    return None


def too_few_answers(answers: list[dict[str, Any]]) -> object:
    answers.pop()
    return None


def aborted(answers: list[dict[str, Any]]) -> object:
    answers[-1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
    return None


def once(trick: Trick) -> Trick:
    left = [trick]
    return lambda answers: left.pop()(answers) if left else None


@contextmanager
def serving(*servers: FakeServer) -> Iterator[tuple[FakeServer, ...]]:
    """Run the servers."""
    thread = LoopThread("fake servers")
    runners = [
        web.AppRunner(server.application(), handler_cancellation=True, shutdown_timeout=0.1) for server in servers
    ]

    async def start() -> None:
        for server, runner in zip(servers, runners, strict=True):
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            server.url = "http://{}:{}".format(*runner.addresses[0])

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()

    thread.call(start())
    try:
        yield servers
    finally:
        thread.call(stop())
        thread.close()
