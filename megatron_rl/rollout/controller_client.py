"""The main rank's side of the controller's process: starts it, calls it, and ends the run if it ends."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch, Columns
from megatron_rl.errors import TrainingError
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.peer import Buffer, Peer
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.column_bytes import decode_columns, text_of
from megatron_rl.rollout.gauges import Gauge
from megatron_rl.rollout.remote_weights import WeightSender
from megatron_rl.rollout.service import SampledStep
from megatron_rl.rollout.stop import StopRequested, StopSignal
from megatron_rl.util.child_process import ending_with_parent
from megatron_rl.util.exit_codes import HUNG

log = logging.getLogger(__name__)

SILENT_SECONDS = 120.0
"""A controller that has sent no status for so long is ended, and with it the run."""

WATCH_SECONDS = 5.0
"""Interval of the checks."""

END_SECONDS = 5.0
"""Time from the end of the connection to the end of the process."""

CLOSE_SECONDS = 15.0
"""Time to stop servers and verifiers at the end."""

UNUSED_SECTIONS = {"objective", "correction", "kl", "entropy", "optimizer"}
"""Sections of the configuration that only the trainer reads; a user's objective may be a class of any module."""


class ControllerClient:
    """Starts the controller's process and calls it from the main rank's main thread.

    A controller that is killed takes the buffer with it, so this process then ends with ``HUNG``, which a Slurm job
    answers by resuming. One that fails by itself has printed a traceback, and the next call raises.

    Args:
        sender: the main rank's part of the pushes.
        stop: the stop signal of the main rank.
    """

    def __init__(self, sender: WeightSender, stop: StopSignal) -> None:
        self._sender, self._stop = sender, stop
        self._is_closing = False
        self._status: Mapping[str, Any] = {"progress": 0, "busy_seconds": 0.0, "gauges": []}
        self._heard = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "megatron_rl.rollout.controller_process", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                ending_with_parent(command),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt from the keyboard must reach the trainer only
            )
        self._loop = LoopThread("controller client")
        self._peer = self._loop.call(self._connect(ours))

    def open(self, run: Run, state: Json | None = None) -> None:
        """Start the fleet and the verifiers, or find the servers; ``state`` is that of a checkpoint.

        Raises:
            ConfigError: the run cannot start servers of this engine.
            RolloutError: a server did not become healthy.
        """
        columns = [memoryview(json.dumps(state).encode())] if state is not None else []
        self._call("open", {"run": run.model_dump_json(exclude=UNUSED_SECTIONS)}, columns)

    def next_batch(self, step: int) -> SampledStep | None:
        """Wait for the groups of a step; None if a stop was requested."""
        value, data = self._stoppable("next_batch", {"step": step})
        if value is None:
            return None
        columns = dict(decode_columns(value["columns"], data))
        lines, ledger = text_of(columns.pop("lines")), text_of(columns.pop("ledger"))
        samples = StepSamples(value["output_tokens"], self._read_samples, lines, ledger, value["counts"])
        return SampledStep(Batch(columns.pop("lengths_B"), columns), value["schema"], samples)

    def columns(self, sample_indices: Tensor) -> Columns:
        """Return all token columns of the newest step's responses with these indices, in this order."""
        value, data = self._call("columns", {"samples": sample_indices.tolist()})
        return decode_columns(value, data)

    def forget_columns(self) -> None:
        """Let the controller free the token columns of the newest step."""
        self._notify("forget_columns")

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy on the held-out prompts and their number; None if a stop was requested."""
        value, _ = self._stoppable("evaluate", {"step": step})
        return None if value is None else (value[0], value[1])

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Push weights to all servers, see ``WeightSender.push``."""
        self._sender.push(self._loop, self, named_tensors, version)

    def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call a function of the controller by its name; return the JSON value."""
        return self._call(name, arguments)[0]

    def request_groups(self, version: int) -> None:
        """Let the fleet sample the groups that weights of this version may sample ahead."""
        self._call("request_groups", {"version": version})

    def state(self) -> Json:
        """Return what a checkpoint must contain to continue with the same samples."""
        return json.loads(bytes(self._call("state")[1]))

    def progress(self) -> int:
        """Return a number that changes while servers work or groups are verified. Callable in any thread."""
        return self._status["progress"]

    @property
    def busy_seconds(self) -> float:
        """Total time that a server has had unfinished requests, mean over the servers."""
        return self._status["busy_seconds"]

    def gauges(self) -> Iterable[Gauge]:
        """Return the state of the queue and the servers, at most a second old. Callable in any thread."""
        return [(name, text, value, labels) for name, text, value, labels in self._status["gauges"]]

    def close(self) -> None:
        """End the controller and everything that it started; closing again has no effect."""
        if self._is_closing:
            return
        self._is_closing = True
        try:
            if self.process.poll() is None:
                self._notify("stop")
                self._start("close").result(CLOSE_SECONDS)
        except TimeoutError:
            log.warning("The rollout controller did not end within %g s and was killed", CLOSE_SECONDS)
        finally:
            self._loop.call(self._disconnect())
            self._loop.close()
            self.process.kill()
            self.process.wait()

    def _read_samples(self, indices: Sequence[int]) -> list[RecordedSample]:
        value, _ = self._call("samples", {"indices": list(indices)})
        return [RecordedSample(**sample) for sample in value]

    def _stoppable(self, name: str, arguments: Mapping[str, Any]) -> tuple[Any, Buffer]:
        """Return the result of a call; a stop request is passed on, and the controller decides which comes first."""
        if self._stop.requested:
            self._notify("stop")
        answer = self._start(name, arguments)
        try:
            return self._stop.wait(answer.result)
        except StopRequested:
            self._notify("stop")
            return answer.result()

    def _call(
        self, name: str, arguments: Mapping[str, Any] | None = None, columns: Sequence[memoryview] = ()
    ) -> tuple[Any, Buffer]:
        return self._start(name, arguments, columns).result()

    def _start(
        self, name: str, arguments: Mapping[str, Any] | None = None, columns: Sequence[memoryview] = ()
    ) -> "Future[tuple[Any, Buffer]]":
        return self._loop.start(self._peer.call(name, arguments, columns))

    def _notify(self, name: str) -> None:
        self._loop.call(self._send_notice(name))

    # The methods below run on the event loop.

    async def _connect(self, connection: socket.socket) -> Peer:
        notices = {"status": self._handle_status, "log": self._handle_log}
        peer = Peer(connection, self._sender.handlers, notices, self._ended)
        self._loop.start(self._watch(peer))
        return peer

    async def _send_notice(self, name: str) -> None:
        self._peer.notify(name)

    async def _disconnect(self) -> None:
        self._peer.close()
        await self._sender.close()

    async def _watch(self, peer: Peer) -> None:
        """End a controller that does not react."""
        while time.monotonic() - self._heard < SILENT_SECONDS:
            await asyncio.sleep(WATCH_SECONDS)
        log.warning("The rollout controller has not reacted for %g s", SILENT_SECONDS)
        self.process.kill()

    def _handle_status(self, status: Mapping[str, Any]) -> None:
        self._status, self._heard = status, time.monotonic()

    def _handle_log(self, record: Mapping[str, Any]) -> None:
        logging.getLogger(record["logger"]).log(record["level"], "%s", record["message"])

    def _ended(self) -> Exception:
        """Return the error of unanswered calls; end this process if the controller was killed."""
        if self._is_closing:
            return TrainingError("the rollout controller was closed")
        try:
            status = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if status < 0:
            self._end_run(signal.Signals(-status).name)
        return TrainingError(f"the rollout controller ended with exit code {status}; its message is above")

    def _end_run(self, cause: str) -> None:
        """End this process at once: the main thread may be in a collective or a kernel for minutes."""
        hint = "; was there too little memory?" if cause == "SIGKILL" else ""
        log.error(
            "The rollout controller (process %d) was ended by %s%s. The run ends with code %d; to continue it: the same"
            " command with train.resume=true",
            self.process.pid,
            cause,
            hint,
            HUNG,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(HUNG)
