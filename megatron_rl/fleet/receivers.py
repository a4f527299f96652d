"""The fleet's side of its receiver processes: starts them, gives them requests, and replaces those that end."""

import asyncio
import logging
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.channel import Channel
from megatron_rl.fleet.http import HttpClient
from megatron_rl.fleet.protocol import (
    BadAnswer,
    GenerationRequest,
    GenerationResult,
    RequestRefused,
    ServerTimeout,
    ServerUnreachable,
    WrongVersion,
)
from megatron_rl.fleet.result_columns import decode_results, request_to_json

log = logging.getLogger(__name__)
_ERRORS = {kind.__name__: kind for kind in (BadAnswer, RequestRefused, ServerTimeout, ServerUnreachable, WrongVersion)}
_PING_SECONDS = 5.0
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Environment of a receiver: glibc gives memory back to the kernel only above so many free bytes. By default it gives
back the buffers of each answer, and getting new ones costs a fifth of the time."""
_SILENT_SECONDS = 120.0
"""A process that has not reacted for so long is replaced; it does not react while it parses a body."""


class ReceiverEnded(RolloutError):
    """The receiver process of a request ended; no server is to blame."""


class Receiver:
    """A receiver process, started by its first request; use it from one event loop."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._heard = 0.0
        self._numbers = count()
        self._pending: dict[int, asyncio.Future[list[GenerationResult]]] = {}

    async def generate(
        self, client: HttpClient, requests: Sequence[GenerationRequest], versions: Collection[str] | None
    ) -> list[GenerationResult]:
        """Sample or score these sequences on the client's server, in one HTTP request.

        Raises:
            ReceiverEnded: the process ended, or does not react.
            RolloutError: an error of ``HttpClient.generate``.
        """
        if self._channel is None or not self._channel.is_open:
            self._start()
        channel, number = self._channel, next(self._numbers)
        assert channel is not None, "was just started"
        done = self._pending[number] = asyncio.get_running_loop().create_future()
        entries = [request_to_json(request) for request in requests]
        allowed = None if versions is None else sorted(versions)
        message = {"id": number, "api": client.api, "url": client.url, "requests": entries, "versions": allowed}
        channel.send(message)
        try:
            return await done
        finally:
            del self._pending[number]
            if done.cancelled() and channel.is_open:
                channel.send({"cancel": number})

    async def _watch(self, channel: Channel) -> None:
        """End a process that does not react."""
        while channel.is_open:
            if time.monotonic() - self._heard > _SILENT_SECONDS:
                log.warning("A receiver process has not reacted for %g s", _SILENT_SECONDS)
                channel.close()
                return
            channel.send({"ping": True})
            await asyncio.sleep(_PING_SECONDS)

    def close(self) -> None:
        """End the process and wait for it."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._channel is not None:
            self._channel.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rl.fleet.receiver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | MALLOC_VARIABLES,
                start_new_session=True,  # an interrupt from the keyboard must reach the trainer only
            )
        self._heard = time.monotonic()
        self._channel = Channel(ours, self._handle, self._ended)
        self._watcher = asyncio.ensure_future(self._watch(self._channel))

    def _handle(self, message: Mapping[str, Any], data: bytearray | mmap.mmap) -> None:
        self._heard = time.monotonic()
        future = self._pending.get(message.get("id", -1))
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(_ERRORS[message["error"]](message["message"]))
        else:
            future.set_result(decode_results(message["results"], data))

    def _ended(self) -> None:
        assert self.process is not None, "has a channel"
        self.process.kill()
        status = self.process.wait()
        message = f"receiver process {self.process.pid} ended with status {status}"
        pending = [future for future in self._pending.values() if not future.done()]
        if pending:
            log.warning("The %s; its %d requests are repeated", message, len(pending))
        for future in pending:
            future.set_exception(ReceiverEnded(message))
