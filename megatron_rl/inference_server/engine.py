"""The model thread: runs decode steps, and handles control commands between steps.

    HTTP handlers --submit(request)--> waiting --admit--> batch --step--> finished sequences --> request.done
                  --call(function)---> commands: run between two steps, in order of arrival

With ``batching = "request"`` the sequences of one request are decoded at a time, in order of arrival: results depend
only on the request and the weights. With ``"continuous"``, sequences of several requests share a batch, which uses the
machine better, but the rounding of a sequence's logits then depends on the other sequences.
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
from megatron_rl.inference_server.requests import ActiveSequence, BadRequest, Request

T = TypeVar("T")
Batching = Literal["request", "continuous"]
PauseMode = Literal["abort", "retract", "in_place"]
log = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The model thread has ended; the server cannot answer any more."""


class Engine:
    """Generates the submitted requests until it is closed."""

    def __init__(
        self, model: ServedModel, batching: Batching = "request", max_sequences: int = 512, seed: int = 0
    ) -> None:
        self.model = model
        self.max_sequences = max_sequences
        """Maximum number of sequences in a batch."""
        self.batching = batching
        self.paused = False
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.batch: DecodeBatch | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending: set[Future[object]] = set()
        self._closing = False
        self._ended = False
        self._failing = threading.Lock()
        self.on_end: Callable[[], None] = lambda: None
        """Called by the model thread when it ends."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._seeds = (fold_seed((seed, i)) for i in itertools.count())

    def start(self) -> None:
        """Start the model thread; call this before submitting requests."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the model thread runs."""
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

    def submit(self, request: Request) -> None:
        """Queue a request; ``request.done`` is set when all its sequences have finished."""
        self._put(request.done, lambda: self.waiting.append(request))

    def _put(self, future: "Future[T]", run: Callable[[], None]) -> None:
        pending = cast(Future[object], future)
        self._pending.add(pending)
        pending.add_done_callback(self._pending.discard)
        self._commands.put(run)
        if self._ended:
            self._fail_pending()

    def close(self) -> None:
        """End the model thread after the current step."""
        self._commands.put(lambda: setattr(self, "_closing", True))
        self._thread.join()

    def _run(self) -> None:
        """Run steps until closed. However the thread ends, all pending futures are resolved."""
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._run_commands()
                    if not self.paused and not self._closing:
                        self._admit()
                        self._step()
        finally:
            # The order matters: whoever adds a future after the flag is set fails it; this thread fails earlier ones.
            self._ended = True
            self._fail_pending()
            self.on_end()

    def _fail_pending(self) -> None:
        with self._failing:
            for future in list(self._pending):
                if not future.done():
                    future.set_exception(EngineStopped("the engine has stopped; its log says why"))

    def _run_commands(self) -> None:
        idle = self.paused or not (self.batch or self.waiting or self._has_unadmitted())
        while not self._closing and (idle or not self._commands.empty()):
            self._commands.get()()
            idle = False

    def _has_unadmitted(self) -> bool:
        return any(request.waiting for request in self.running)

    def _admit(self) -> None:
        if self.batch and self.batching == "request":
            return
        count = len(self.waiting) if self.batching == "continuous" else int(not self.running)
        self.running += self.waiting[:count]
        del self.waiting[:count]
        sequences: list[ActiveSequence] = []
        room = self.max_sequences - (len(self.batch) if self.batch else 0)
        for request in self.running:
            left = room - len(sequences)
            sequences += request.waiting[:left]
            del request.waiting[:left]
        if sequences:
            self._start(sequences)

    def _start(self, sequences: list[ActiveSequence]) -> None:
        to_score = [s for s in sequences if s.input_start >= 0 and not s.input_logprobs]
        scores = score(self.model.model, [s.prompt for s in to_score])
        for sequence, logprobs in zip(to_score, scores, strict=True):
            sequence.input_logprobs = logprobs
        for sequence in sequences:
            sequence.note_version(self.model.version, len(sequence.output_ids))
            if sequence.limit == 0:
                sequence.finish_reason = {"type": "length", "length": 0}
        self._finish([s for s in sequences if s.finish_reason])
        sequences = [s for s in sequences if not s.finish_reason]
        if not sequences:
            return
        seeds = [self._seed_of(sequence) for sequence in sequences]
        batch, finished = prefill(self.model.model, sequences, seeds, self.model.eos_ids, self.model.recorder)
        self.batch = self.batch.join(batch) if self.batch else batch
        self._finish(finished)

    def _seed_of(self, sequence: ActiveSequence) -> int:
        if sequence.seed is None:
            sequence.seed = next(self._seeds)
        return sequence.seed

    def _step(self) -> None:
        if self.batch:
            self._finish(self.batch.step())
        if self.batch and self.batch.has_stop_strings:
            self._finish(self._at_stop_string(self.batch))

    def _at_stop_string(self, batch: DecodeBatch) -> list[ActiveSequence]:
        stopped = []
        for sequence in [s for s in batch.active.values() if s.params.stop_strings]:
            # A stop string of n characters is in the last n tokens; 4 more for characters of several tokens.
            tail = batch.peek(sequence)[0][-(max(map(len, sequence.params.stop_strings)) + 4) :]
            text = self.model.text(tail, skip_special_tokens=False)
            found = [stop for stop in sequence.params.stop_strings if stop in text]
            if found:
                sequence.finish_reason = {"type": "stop", "matched": found[0]}
                stopped.append(sequence)
        return batch.withdraw(stopped) if stopped else []

    def _finish(self, sequences: Sequence[ActiveSequence]) -> None:
        for sequence in sequences:
            sequence.request.finish_one()
        if self.batch is not None and not self.batch:
            self.batch = None
        self.running = [request for request in self.running if request.num_unfinished]

    # The methods below run on the model thread: handlers pass them to call().

    def pause(self, mode: PauseMode) -> None:
        """Stop decoding: abort all requests, retract their sequences to the queue, or leave the batch in place."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        """Continue decoding."""
        self.paused = False

    def retract(self) -> None:
        """Return all sequences to the queue with their tokens; prefill computes their cache again with new weights."""
        for sequence in self.batch.withdraw(list(self.batch.active.values())) if self.batch else []:
            sequence.num_retractions += 1
            sequence.request.waiting.append(sequence)
        for request in self.running:
            request.waiting.sort(key=lambda sequence: sequence.index)
        self.batch = None

    def abort(self, rid: str | None, message: str = "Aborted") -> None:
        """Abort the sequence with this id, or all; they are answered with the tokens they have."""
        requests = [*self.running, *self.waiting]
        self.abort_sequences([s for request in requests for s in request.sequences if rid in (None, s.rid)], message)

    def abort_sequences(self, sequences: Sequence[ActiveSequence], message: str = "Aborted") -> None:
        """Abort those of the sequences that are not finished."""
        sequences = [sequence for sequence in sequences if not sequence.finish_reason]
        if self.batch:
            self.batch.withdraw(sequences)
        for sequence in sequences:
            sequence.finish_reason = {"type": "abort", "message": message, "status_code": None, "err_type": None}
        for request in {sequence.request for sequence in sequences}:
            request.waiting = [sequence for sequence in request.waiting if not sequence.finish_reason]
        self._finish(sequences)
        self.waiting = [request for request in self.waiting if request.num_unfinished]

    def update_output(self, sequence: ActiveSequence) -> None:
        """Copy the tokens decoded so far to the sequence."""
        request = sequence.request
        waits = sequence in request.waiting or request not in self.running
        if self.batch and not sequence.finish_reason and not waits:
            self.batch.peek(sequence)

    def flush(self) -> None:
        """Empty the prefix cache. There is none, but as in SGLang this is refused while sequences run."""
        if self.batch:
            raise BadRequest(f"cache not flushed: {len(self.batch)} sequences are running; retract or abort them first")

    def change_weights(self, change: Callable[[], T], version: str | None) -> T:
        """Change the weights or their version; running sequences record the new version."""
        result = change()
        if version is not None:
            self.model.version = version
            if self.batch:
                self.batch.note_version(version)
        return result
