"""A receiver process: sends requests to inference servers, and parses and validates their answers, without torch.

    fleet --request--> receiver --HTTP--> server
    fleet <--columns-- receiver <--JSON--

JSON that is parsed in the trainer's process would stop its other threads for the whole of a body. A receiver is told
everything it needs with each request, so it may be killed at any time: the fleet starts another and repeats the
requests. It ends when its connection closes.

Run as a program: ``python -m megatron_rl.fleet.receiver DESCRIPTOR``, the number of an inherited Unix socket.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.channel import Channel
from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.result_columns import encode_results, request_from_json
from megatron_rl.fleet.vllm_http import VllmHttpClient
from megatron_rl.util.garbage import freeze_startup_objects

CLIENTS: Mapping[str, type[HttpClient]] = {client.api: client for client in (HttpClient, VllmHttpClient)}


class ReceiverService:
    """The requests that a receiver works on."""

    def __init__(self, connection: socket.socket) -> None:
        self.closed = asyncio.Event()
        self._channel = Channel(connection, self._handle, self.closed.set)
        self._clients: dict[tuple[str, str], HttpClient] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Cancel the requests and close the connections."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    def _handle(self, message: Mapping[str, Any], _data: object) -> None:
        if "ping" in message:
            self._channel.send(message)
            return
        if (number := message.get("cancel")) is not None:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
            return
        number = message["id"]
        self._tasks[number] = asyncio.ensure_future(self._answer(number, message))
        self._tasks[number].add_done_callback(lambda _: self._tasks.pop(number))

    async def _answer(self, number: int, message: Mapping[str, Any]) -> None:
        key = message["api"], message["url"]
        if key not in self._clients:
            self._clients[key] = CLIENTS[key[0]](key[1], request_timeout_seconds=None)  # the fleet cancels
        client = self._clients[key]
        requests = [request_from_json(fields) for fields in message["requests"]]
        try:
            results = await client.generate(requests, message["versions"])
        except RolloutError as error:
            self._channel.send({"id": number, "error": type(error).__name__, "message": str(error)})
            return
        entries, columns = encode_results(results)
        self._channel.send({"id": number, "results": entries}, columns)


async def serve(connection: socket.socket) -> None:
    """Work on the requests of a connection until it closes."""
    service = ReceiverService(connection)
    try:
        await service.closed.wait()
    finally:
        await service.close()


def main() -> None:
    """Run a receiver on the socket whose descriptor is the only argument."""
    freeze_startup_objects()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
