"""Calls between two processes over a channel: a name, JSON arguments and columns, and a JSON value and columns back.

    {"call": 3, "name": ..., "arguments": {...}}      {"answer": 3, "value": ...}
    {"notice": ..., "arguments": {...}}               {"answer": 3, "error": "RolloutError", "message": ...}

Errors of this package keep their class; any other exception becomes a ``RemoteFailure`` with its traceback.
"""

import asyncio
import mmap
import socket
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from megatron_rl.errors import ConfigError, DataError, MegatronRLError, RolloutError, TrainingError
from megatron_rl.fleet.channel import Channel
from megatron_rl.fleet.protocol import BadAnswer, RequestRefused, ServerTimeout, ServerUnreachable, WrongVersion

Json = Mapping[str, Any]
Buffer = bytearray | mmap.mmap
_ERRORS: Mapping[str, type[MegatronRLError]] = {
    kind.__name__: kind
    for kind in (
        MegatronRLError,
        ConfigError,
        DataError,
        TrainingError,
        RolloutError,
        BadAnswer,
        RequestRefused,
        ServerTimeout,
        ServerUnreachable,
        WrongVersion,
    )
}


class RemoteFailure(RuntimeError):
    """An unexpected exception in the other process; the message is its traceback."""


@dataclass(frozen=True)
class PeerReply:
    """The result of a call: a JSON value, and the bytes of columns."""

    value: object = None
    columns: Sequence[memoryview] = ()


CallHandler = Callable[[Json, Buffer], Awaitable[PeerReply]]
NoticeHandler = Callable[[Json], None]


def error_to_json(error: BaseException) -> Json:
    """Return the class and the message of an error."""
    known = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), "")
    return {"error": known, "message": str(error) if known else "".join(traceback.format_exception(error))}


def error_from_json(fields: Json) -> MegatronRLError | RemoteFailure:
    """Return the error that ``error_to_json`` encoded."""
    return _ERRORS.get(fields["error"], RemoteFailure)(fields["message"])


class Peer:
    """One side of a connection; use it on the event loop that made it.

    Args:
        connection: a connected Unix stream socket.
        calls: handlers of the other side's calls, by name.
        notices: handlers of its notices, by name.
        on_close: called once when the connection has closed; returns the error of the calls without an answer.
    """

    def __init__(
        self,
        connection: socket.socket,
        calls: Mapping[str, CallHandler],
        notices: Mapping[str, NoticeHandler],
        on_close: Callable[[], Exception],
    ) -> None:
        self._calls, self._notices, self._on_close = calls, notices, on_close
        self._numbers = count()
        self._pending: dict[int, asyncio.Future[tuple[Any, Buffer]]] = {}
        self._tasks: set[asyncio.Task[PeerReply]] = set()
        self._error: Exception | None = None
        self._channel = Channel(connection, self._handle, self._closed)

    async def call(
        self, name: str, arguments: Json | None = None, columns: Sequence[memoryview] = ()
    ) -> tuple[Any, Buffer]:
        """Return the value and the columns of the other side's answer.

        Raises:
            MegatronRLError: the error that the other side raised.
            RemoteFailure: an unexpected exception of the other side.
        """
        if self._error is not None:
            raise self._error
        number = next(self._numbers)
        done = self._pending[number] = asyncio.get_running_loop().create_future()
        self._channel.send({"call": number, "name": name, "arguments": arguments or {}}, columns)
        try:
            return await done
        finally:
            del self._pending[number]

    def notify(self, name: str, arguments: Json | None = None) -> None:
        """Send a notice, which has no answer; after the end of the connection it is lost."""
        if self._channel.is_open:
            self._channel.send({"notice": name, "arguments": arguments or {}})

    def close(self) -> None:
        """Close the connection; closing again has no effect."""
        self._channel.close()

    def _handle(self, message: Json, data: Buffer) -> None:
        if "notice" in message:
            self._notices[message["notice"]](message["arguments"])
        elif "call" in message:
            task = asyncio.ensure_future(self._run(message, data))
            self._tasks.add(task)
            task.add_done_callback(partial(self._answer, message["call"]))
        elif (done := self._pending.get(message["answer"])) is not None and not done.done():
            if "error" in message:
                done.set_exception(error_from_json(message))
            else:
                done.set_result((message["value"], data))

    async def _run(self, message: Json, data: Buffer) -> PeerReply:
        return await self._calls[message["name"]](message["arguments"], data)

    def _answer(self, number: int, task: asyncio.Task[PeerReply]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or not self._channel.is_open:
            return
        if (error := task.exception()) is not None:
            self._channel.send({"answer": number, **error_to_json(error)})
        else:
            reply = task.result()
            self._channel.send({"answer": number, "value": reply.value}, reply.columns)

    def _closed(self) -> None:
        self._error = self._on_close()
        for done in self._pending.values():
            if not done.done():
                done.set_exception(self._error)
