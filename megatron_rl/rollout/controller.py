"""Batches for the trainer, and weights for the fleet."""

import logging
from collections.abc import Collection, Iterable

from megatron_rl.config.schema import Run
from megatron_rl.data.step import StepSamples
from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import World
from megatron_rl.rollout.backend import RolloutBackend
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.collect import broadcast_batch, collect
from megatron_rl.rollout.evaluation import evaluation_due
from megatron_rl.rollout.fleet_setup import PolicyWeights, push_weights
from megatron_rl.rollout.gauges import Gauge, gauges
from megatron_rl.rollout.records import step_samples, unverified_message
from megatron_rl.rollout.stop import StopRequested, StopSignal
from megatron_rl.rollout.stream import Stream, Verified, wait_for_any

log = logging.getLogger(__name__)


class RolloutController:
    """Gives every rank the batch of each step, and pushes new weights to the fleet.

    Every rank has one and calls its methods in the same order. The main rank, which alone has a backend, samples,
    verifies and broadcasts the batch; the other ranks receive it, and help to gather the weights.

    Args:
        run: the configuration.
        world: this rank.
        backend: the fleet, task and verifier of the main rank; None on the others.
        stop: ends ``next_batch`` without a batch.
        state: a result of ``state`` to continue from.
    """

    def __init__(
        self, run: Run, world: World, backend: RolloutBackend | None, stop: StopSignal, state: Json | None = None
    ) -> None:
        self._run, self._world, self._stop = run, world, stop
        self._stream: Stream | None = None
        if backend is not None:
            self._stream = Stream(run, backend.fleet, backend.task, state, backend.verifier)
        self.samples = StepSamples()
        """The samples of the newest batch."""

    def next_batch(self, step: int) -> Batch | None:
        """Return the batch of a step, the same on every rank; None if a stop was requested."""
        return broadcast_batch(self._sample(self._stream, step) if self._stream else None, self._world)

    def _sample(self, stream: Stream, step: int) -> Batch | None:
        if self._stop.requested:
            return None
        try:
            taken = stream.take(step, self._wait)
        except StopRequested:
            return None
        batch = collect([group.group for group in taken.used], [group.verdicts for group in taken.used], self._run)
        self.samples = step_samples(step, taken, batch, self._run)
        if (message := unverified_message(step, taken.verdicts)) is not None:
            log.warning(message)
        return batch

    def _wait(self, pending: Collection[Verified]) -> None:
        self._stop.wait(lambda: wait_for_any(pending))

    def push_weights(self, weights: PolicyWeights, version: int) -> None:
        """Give all servers these weights; with a lag, also request the groups that they may sample ahead."""
        push_weights(self._run, self._world, weights, version, self._stream.fleet if self._stream else None)
        idle = self._run.rollout.max_lag == 0 or evaluation_due(self._run, version) or self._stop.requested
        if self._stream and not idle:
            self._stream.request_groups(version)

    def gauges(self) -> Iterable[Gauge]:
        """Return the current state of the queue and the servers; nothing on the other ranks. Callable in any thread."""
        return gauges(self._stream) if self._stream else ()

    def fleet_seconds(self) -> float:
        """Return how long a server has had requests so far, mean over the servers."""
        return self._stream.fleet.busy_seconds if self._stream else 0.0

    def state(self) -> Json:
        """Return what a checkpoint must contain to continue with the same samples; empty on the other ranks."""
        return self._stream.state() if self._stream else {}
