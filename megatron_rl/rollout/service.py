"""What the controller's process does for the main rank: batches of a run, evaluations, and the state of a checkpoint.

It holds the fleet, the buffer and the verifiers, and of a step the columns and samples until the next one begins.
``controller_process`` connects it with the main rank; this module knows neither sockets nor ranks.
"""

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_rl.config.schema import Run
from megatron_rl.data.step import RecordedSample, StepSamples
from megatron_rl.data.types import Batch, Columns
from megatron_rl.rollout.backend import RolloutBackend
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.collect import add_pruning, collect
from megatron_rl.rollout.distribution import ReadColumns, Schema, columns_of, schema_of
from megatron_rl.rollout.evaluation import evaluation_request, heldout_prompts
from megatron_rl.rollout.records import step_samples, unverified_message
from megatron_rl.rollout.routes import requested_routes
from megatron_rl.rollout.stop import StopRequested
from megatron_rl.rollout.stream import Stream, Verified
from megatron_rl.util.garbage import collect_garbage

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledStep:
    """A step without its tokens: what the main rank gets at once.

    Attributes:
        outline: the per-response columns.
        schema: the token columns, which are read later.
        samples: records of the samples.
    """

    outline: Batch
    schema: Schema
    samples: StepSamples


class RolloutService:
    """Samples, verifies and evaluates. Its methods are called one after the other, except ``stop``.

    Args:
        run: the configuration.
        backend: the fleet, the task and the verifier.
        stop: is completed when the run shall stop; ends waits for samples.
        state: a result of ``state`` to continue from.
    """

    def __init__(self, run: Run, backend: RolloutBackend, stop: "Future[None]", state: Json | None = None) -> None:
        self._run, self._backend, self._stop = run, backend, stop
        self.stream = Stream(run, backend.fleet, backend.task, state, backend.verifier)
        self._prompts = heldout_prompts(run, backend.task) if run.evaluate.every else ()
        self._read: ReadColumns | None = None
        self._samples = StepSamples()

    def next_batch(self, step: int) -> SampledStep | None:
        """Wait for the groups of a step; None if a stop was requested, after which no group is lost."""
        self._read, self._samples = None, StepSamples()
        collect_garbage()
        if self._stop.done():
            return None
        try:
            taken = self.stream.take(step, self._wait_for_any)
        except StopRequested:
            return None
        batch = collect([group.group for group in taken.used], [group.verdicts for group in taken.used], self._run)
        batch = add_pruning(batch, self._run, step)
        self._read, self._samples = columns_of(batch), step_samples(step, taken, batch, self._run)
        if (message := unverified_message(step, taken.verdicts)) is not None:
            log.warning(message)
        return SampledStep(batch.outline(), schema_of(batch.columns), self._samples)

    def columns(self, sample_indices: Sequence[int]) -> Columns:
        """Return all token columns of the newest step's responses with these indices, in this order."""
        assert self._read is not None, "columns are read between two steps"
        return self._read(torch.tensor(sample_indices, dtype=torch.int64))

    def forget_columns(self) -> None:
        """Free the token columns of the newest step: every replica has its own."""
        self._read = None

    def samples(self, indices: Sequence[int]) -> Sequence[RecordedSample]:
        """Return the newest step's samples with these indices."""
        return self._samples.read(indices)

    def evaluate(self, step: int) -> tuple[float, int] | None:
        """Return the accuracy on the held-out prompts and their number; None if a stop was requested."""
        prompts, samples, sampling, seed = evaluation_request(self._run, self._prompts, step)
        fleet, routes = self._backend.fleet, requested_routes(self._run)
        pending = fleet.submit(prompts, samples, sampling, seed, range(step, step + 1), routes=routes)
        try:
            groups = [group for _, batch in pending for group in self._result(batch)]
            verdicts = self._result(self._backend.verifier.submit(groups))
        except StopRequested:
            return None
        finally:
            for _, batch in pending:
                batch.cancel()
        correct = [verdict.correct for group in verdicts for verdict in group]
        return sum(correct) / len(correct), len(groups)

    def request_groups(self, version: int) -> None:
        """Request the groups that weights of this version may sample ahead."""
        self.stream.request_groups(version)

    def state(self) -> Json:
        """Return what a checkpoint must contain to continue with the same samples."""
        return self.stream.state()

    def _wait_for_any(self, pending: Collection[Verified]) -> None:
        self._wait([*pending])

    def _result(self, future: "Future[T]") -> T:
        self._wait([future])
        return future.result()

    def _wait(self, futures: "Sequence[Future[Any]]") -> None:
        """Return when one of the futures is done; raise ``StopRequested`` when a stop was requested before."""
        wait([*futures, self._stop], return_when=FIRST_COMPLETED)
        if self._stop.done():
            raise StopRequested
