"""The controller's process: samples and verifies for the main rank of the trainer, which has the weights.

    main rank <--Unix socket--> this process --> receivers --HTTP--> servers
                                             --> verifiers

It has no rank and does not import megatron-core. It imports torch, because the settings (``config.schema`` has the
objectives), ``Batch`` and the advantages need it, and transformers, whose tokenizers do. It is a child of the main
rank, ends with it, and ends everything that it started. If it ends first, the main rank ends the run.

Run as a program: ``python -m megatron_rl.rollout.controller_process DESCRIPTOR``, the number of an inherited Unix
socket.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rl.config.schema import Run
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.peer import Buffer, CallHandler, Json, Peer, PeerReply
from megatron_rl.models.tokenizers import open_tokenizer
from megatron_rl.rollout.backend import RolloutBackend
from megatron_rl.rollout.column_bytes import encode_columns, text_column
from megatron_rl.rollout.fleet_setup import open_fleet
from megatron_rl.rollout.gauges import gauges
from megatron_rl.rollout.remote_weights import RemoteTransport
from megatron_rl.rollout.service import RolloutService
from megatron_rl.tasks import make_task
from megatron_rl.tasks.open_verifier import open_verifier
from megatron_rl.util.garbage import freeze_startup_objects
from megatron_rl.util.logs import logging_to
from megatron_rl.weights.transport import WeightUpdate

STATUS_SECONDS = 1.0
"""Interval of the notices from which the main rank knows that this process works."""

Work = Callable[[Json, Buffer], PeerReply]


class ForwardingHandler(logging.Handler):
    """Sends log messages to the main rank, whose logger shows them."""

    def __init__(self, notify: Callable[[str, Json], None]) -> None:
        super().__init__()
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message."""
        self._notify("log", {"logger": record.name, "level": record.levelno, "message": record.getMessage()})


class ControllerProcess:
    """Answers the main rank. Calls are worked on one after the other by one thread; notices are handled at once."""

    def __init__(self, connection: socket.socket) -> None:
        self.closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._worker = ThreadPoolExecutor(1, "controller")
        self._stop: Future[None] = Future()
        self._parts = ExitStack()
        self._fleet: Fleet | None = None
        self._service: RolloutService | None = None
        self._update: WeightUpdate | None = None
        works: dict[str, Work] = {
            "open": self._open,
            "next_batch": self._next_batch,
            "columns": self._columns,
            "samples": self._samples,
            "evaluate": self._evaluate,
            "state": self._state,
            "request_groups": self._request_groups,
            "begin_push": self._begin_push,
            "end_push": self._end_push,
            "release_push": self._release_push,
            "close": self._close,
        }
        calls = {name: self._in_worker(work) for name, work in works.items()}
        notices = {"stop": self._request_stop, "forget_columns": self._forget_columns}
        self._peer = Peer(connection, calls, notices, self._disconnected)
        self.notify = self._peer.notify

    def notify_from_thread(self, name: str, arguments: Json) -> None:
        """Send a notice; callable in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._peer.notify, name, arguments)

    async def report_status(self) -> None:
        """Send a notice at regular intervals."""
        while True:
            self._peer.notify("status", self._status())
            await asyncio.sleep(STATUS_SECONDS)

    def _status(self) -> Json:
        if self._service is None or self._fleet is None:
            return {"progress": 0, "busy_seconds": 0.0, "gauges": []}
        stream = self._service.stream
        busy_seconds = self._fleet.busy_seconds
        return {"progress": stream.progress(), "busy_seconds": busy_seconds, "gauges": list(gauges(stream))}

    def _in_worker(self, work: Work) -> CallHandler:
        async def handle(arguments: Json, data: Buffer) -> PeerReply:
            reply = await self._loop.run_in_executor(self._worker, work, arguments, data)
            self._peer.notify("status", self._status())
            return reply

        return handle

    def _request_stop(self, _arguments: Json) -> None:
        if not self._stop.done():
            self._stop.set_result(None)

    def _disconnected(self) -> Exception:
        # The main rank ended or was killed. Whatever the worker does, there is nobody to do it for; servers and
        # verifiers are killed with this process, receivers end with their connection.
        os._exit(0 if self.closed.is_set() else 1)

    # The methods below run in the worker.

    def _open(self, arguments: Json, data: Buffer) -> PeerReply:
        run = Run.model_validate_json(arguments["run"])
        tokenizer = open_tokenizer(Path(run.model.path), trust_code=run.model.trust_code)
        verifier = self._parts.enter_context(closing(open_verifier(run)))  # starts while the fleet starts
        transport = RemoteTransport(self._call_main_rank)
        self._fleet = self._parts.enter_context(open_fleet(run, tokenizer, transport))
        backend = RolloutBackend(self._fleet, make_task(run.task, tokenizer), verifier)
        state = json.loads(bytes(data)) if data else None
        self._service = RolloutService(run, backend, self._stop, state)
        freeze_startup_objects()
        return PeerReply()

    async def _call_main_rank(self, name: str, arguments: Json | None = None) -> Any:
        """Call a function of the main rank from the fleet's event loop; return the JSON value."""
        call = asyncio.run_coroutine_threadsafe(self._peer.call(name, arguments), self._loop)
        value, _ = await asyncio.wrap_future(call)
        return value

    def _next_batch(self, arguments: Json, _data: Buffer) -> PeerReply:
        sampled = self._opened.next_batch(arguments["step"])
        if sampled is None:
            return PeerReply()
        outline, samples = sampled.outline, sampled.samples
        texts = {"lines": text_column(samples.lines), "ledger": text_column(samples.ledger)}
        header, columns = encode_columns({"lengths_B": outline.lengths_B, **outline.columns, **texts})
        value = {"schema": sampled.schema, "counts": samples.counts, "output_tokens": samples.output_tokens}
        return PeerReply({"columns": header, **value}, columns)

    def _columns(self, arguments: Json, _data: Buffer) -> PeerReply:
        return PeerReply(*encode_columns(self._opened.columns(arguments["samples"])))

    def _forget_columns(self, _arguments: Json) -> None:
        self._worker.submit(self._opened.forget_columns)

    def _samples(self, arguments: Json, _data: Buffer) -> PeerReply:
        return PeerReply([vars(sample) for sample in self._opened.samples(arguments["indices"])])

    def _evaluate(self, arguments: Json, _data: Buffer) -> PeerReply:
        return PeerReply(self._opened.evaluate(arguments["step"]))

    def _state(self, _arguments: Json, _data: Buffer) -> PeerReply:
        return PeerReply(None, [memoryview(json.dumps(self._opened.state()).encode())])

    def _request_groups(self, arguments: Json, _data: Buffer) -> PeerReply:
        self._opened.request_groups(arguments["version"])
        return PeerReply()

    def _begin_push(self, arguments: Json, _data: Buffer) -> PeerReply:
        self._update = self._opened_fleet.begin_push(arguments["version"])
        return PeerReply()

    def _end_push(self, arguments: Json, _data: Buffer) -> PeerReply:
        assert self._update is not None, "was begun"
        self._opened_fleet.end_push(self._update, arguments["version"], [])
        return PeerReply()

    def _release_push(self, _arguments: Json, _data: Buffer) -> PeerReply:
        self._opened_fleet.release_push()
        return PeerReply()

    def _close(self, _arguments: Json, _data: Buffer) -> PeerReply:
        self._parts.close()
        self._loop.call_soon_threadsafe(self.closed.set)
        return PeerReply()

    @property
    def _opened(self) -> RolloutService:
        assert self._service is not None, "the main rank calls open first"
        return self._service

    @property
    def _opened_fleet(self) -> Fleet:
        assert self._fleet is not None, "the main rank calls open first"
        return self._fleet


async def serve(connection: socket.socket) -> None:
    """Answer the main rank until it closes the connection."""
    process = ControllerProcess(connection)
    with logging_to(ForwardingHandler(process.notify_from_thread)):
        await process.report_status()


def main() -> None:
    """Run the controller on the socket whose descriptor is the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the main rank stops the run
        signal.signal(number, _ignored)
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))


def _ignored(number: int, frame: FrameType | None) -> None:
    """Ignore a signal. Unlike ``SIG_IGN``, child processes do not inherit this."""


if __name__ == "__main__":
    main()
