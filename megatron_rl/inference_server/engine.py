"""The thread that owns the model: it decodes, and between two tokens it obeys.

    HTTP handlers --submit(work)--> waiting --admit--> batch --step--> finished rows --> work.done
                  --call(f)-------> inbox: run between two steps, in order of arrival

``batching = "request"`` decodes the rows of one request at a time, in order of arrival: what a request gets depends on
the request and the weights alone, whatever else goes on. ``"continuous"`` lets rows of several requests share a batch:
better use of the machine, but the rounding of a row's logits then depends on its company.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar, cast

import torch

from megatron_rl.data.types import fold_seed
from megatron_rl.inference_server.decode import DecodeBatch
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.prefill import prefill, score
from megatron_rl.inference_server.requests import BadRequest, Row, Work

T = TypeVar("T")
Batching = Literal["request", "continuous"]
PauseMode = Literal["abort", "retract", "in_place"]
log = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The engine thread has ended; the server is of no use any more."""


class Engine:
    """Decodes what is submitted, until it is closed."""

    def __init__(
        self,
        model: ServedModel,
        batching: Batching = "request",
        max_rows: int = 512,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.batching = batching
        self.paused = False
        self.waiting: list[Work] = []
        self.running: list[Work] = []
        self.batch: DecodeBatch | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: set[Future[object]] = set()
        self._closing = False
        self._ended = False
        self._failing = threading.Lock()
        self.on_end: Callable[[], None] = lambda: None
        """Called by the thread as its last act."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._seeds = (fold_seed((seed, i)) for i in itertools.count())

    def start(self) -> None:
        """Start the thread; before that nothing can be submitted."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run the function between two steps; the future has its result, or the BadRequest that it raised."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BadRequest as error:
                future.set_exception(error)

        self._put(future, run)
        return future

    def submit(self, work: Work) -> None:
        """Queue the rows; ``work.done`` is set when all have finished."""
        self._put(work.done, lambda: self.waiting.append(work))

    def _put(self, future: "Future[T]", run: Callable[[], None]) -> None:
        pending = cast(Future[object], future)
        self._open.add(pending)
        pending.add_done_callback(self._open.discard)
        self._inbox.put(run)
        if self._ended:
            self._fail_open()

    def close(self) -> None:
        """End the thread after the current step."""
        self._inbox.put(lambda: setattr(self, "_closing", True))
        self._thread.join()

    def _run(self) -> None:
        """Decode until closed; whatever ends the thread, nobody is left waiting."""
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._obey()
                    if not self.paused and not self._closing:
                        self._admit()
                        self._step()
        finally:
            # In this order: what is put after the flag is failed by whoever put it, what was put before by this thread.
            self._ended = True
            self._fail_open()
            self.on_end()

    def _fail_open(self) -> None:
        with self._failing:
            for future in list(self._open):
                if not future.done():
                    future.set_exception(EngineStopped("the engine has stopped; its log says why"))

    def _obey(self) -> None:
        idle = self.paused or not (self.batch or self.waiting or self._unadmitted())
        while not self._closing and (idle or not self._inbox.empty()):
            self._inbox.get()()
            idle = False

    def _unadmitted(self) -> bool:
        return any(work.waiting for work in self.running)

    def _admit(self) -> None:
        if self.batch and self.batching == "request":
            return
        if self.waiting and (self.batching == "continuous" or not self.running):
            self.running.append(self.waiting.pop(0))
        for work in list(self.running):
            room = self.max_rows - (len(self.batch) if self.batch else 0)
            if work.waiting and room:
                rows, work.waiting = work.waiting[:room], work.waiting[room:]
                self._start(rows)

    def _start(self, rows: list[Row]) -> None:
        scored = [row for row in rows if row.input_start >= 0 and not row.input_logprobs]
        for row, logprobs in zip(scored, score(self.model.model, [row.prompt for row in scored]), strict=True):
            row.input_logprobs = logprobs
        for row in rows:
            row.note_version(self.model.version, len(row.output_ids))
            if row.limit == 0:
                row.finish = {"type": "length", "length": 0}
        self._finish([row for row in rows if row.finish])
        rows = [row for row in rows if not row.finish]
        if not rows:
            return
        seeds = [self._seed_of(row) for row in rows]
        batch, finished = prefill(self.model.model, rows, seeds, self.model.eos, self.model.routes)
        self.batch = self.batch.join(batch) if self.batch else batch
        self._finish(finished)

    def _seed_of(self, row: Row) -> int:
        if row.seed is None:
            row.seed = next(self._seeds)
        return row.seed

    def _step(self) -> None:
        if self.batch:
            self._finish(self.batch.step())
        if self.batch and self.batch.stop_strings:
            self._finish(self._at_stop_string(self.batch))

    def _at_stop_string(self, batch: DecodeBatch) -> list[Row]:
        stopped = []
        for row in [row for row in batch.live.values() if row.params.stop_strings]:
            # A stop string of n characters lies within the last n tokens; a few more for characters of several tokens.
            tail = batch.peek(row)[0][-(max(map(len, row.params.stop_strings)) + 4) :]
            text = self.model.text(tail, skip_special_tokens=False)
            found = [stop for stop in row.params.stop_strings if stop in text]
            if found:
                row.finish = {"type": "stop", "matched": found[0]}
                stopped.append(row)
        return batch.withdraw(stopped) if stopped else []

    def _finish(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.work.close_one()
        if self.batch is not None and not self.batch:
            self.batch = None
        self.running = [work for work in self.running if work.open]

    # What handlers pass to call():

    def pause(self, mode: PauseMode) -> None:
        """Stop decoding: end all requests, send their rows back to the start of the queue, or leave them in place."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        """Go on decoding."""
        self.paused = False

    def retract(self) -> None:
        """Send all rows back; they keep their tokens, and their cache is computed again under the weights of then."""
        for row in self.batch.withdraw(list(self.batch.live.values())) if self.batch else []:
            row.num_retractions += 1
            row.work.waiting.append(row)
        for work in self.running:
            work.waiting.sort(key=lambda row: row.index)
        self.batch = None

    def abort(self, rid: str | None, message: str = "Aborted") -> None:
        """End the row with this id, or all rows; they are answered with the tokens they have."""
        works = [*self.running, *self.waiting]
        self.abort_rows([row for work in works for row in work.rows if rid in (None, row.rid)], message)

    def abort_rows(self, rows: Sequence[Row], message: str = "Aborted") -> None:
        """End these rows, as far as they have not ended."""
        rows = [row for row in rows if not row.finish]
        if self.batch:
            self.batch.withdraw(rows)
        for row in rows:
            row.finish = {"type": "abort", "message": message, "status_code": None, "err_type": None}
        for work in {row.work for row in rows}:
            work.waiting = [row for row in work.waiting if not row.finish]
        self._finish(rows)
        self.waiting = [work for work in self.waiting if work.open]

    def update_output(self, row: Row) -> None:
        """Bring the row's tokens up to date while it is being decoded."""
        if self.batch and not row.finish and row not in row.work.waiting and row.work in self.running:
            self.batch.peek(row)

    def flush(self) -> None:
        """Forget cached prefixes: there are none, but rows in place must not be pulled from under a pause."""
        if self.batch:
            raise BadRequest(f"cache not flushed: {len(self.batch)} rows are running; retract or abort them first")

    def change_weights(self, change: Callable[[], T], version: str | None) -> T:
        """Apply a change of the weights or their version; rows in the middle of decoding record it."""
        result = change()
        if version is not None:
            self.model.version = version
            if self.batch:
                self.batch.note_version(version)
        return result
