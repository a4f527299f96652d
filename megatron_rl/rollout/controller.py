"""Batches for the trainer, and weights for the fleet."""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.data.minibatch import Minibatch, MinibatchPlan
from megatron_rl.data.step import StepSamples
from megatron_rl.data.types import Batch
from megatron_rl.distributed.collectives import broadcast_tensors
from megatron_rl.distributed.main_rank import main_rank
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.rollout.backend import RolloutBackend
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.collect import collect
from megatron_rl.rollout.distribution import TokenDistribution, columns_of, schema_of
from megatron_rl.rollout.evaluation import evaluation_due
from megatron_rl.rollout.fleet_setup import PolicyWeights, push_weights
from megatron_rl.rollout.gauges import Gauge, gauges
from megatron_rl.rollout.records import step_samples, unverified_message
from megatron_rl.rollout.stop import StopRequested, StopSignal
from megatron_rl.rollout.stream import Stream, Verified, wait_for_any
from megatron_rl.util.garbage import collect_garbage

log = logging.getLogger(__name__)


class CountedWeights:
    """The policy's weights, with the number of tensors that were read so far: the progress of a push."""

    def __init__(self, weights: PolicyWeights) -> None:
        self._weights, self.count = weights, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._counted(self._weights)

    def owned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that this rank owns."""
        yield from self._counted(self._weights.owned_tensors())

    def _counted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for tensor in tensors:
            self.count += 1
            yield tensor


class RolloutController:
    """Gives every rank the outline of each step and the tokens of its own responses, and pushes weights to the fleet.

    Every rank has one and calls its methods in the same order. The main rank, which alone has a backend, samples,
    verifies and sends; the other ranks receive, and help to gather the weights.

    Args:
        run: the configuration.
        mesh: this rank's groups.
        route_layers: which of the layers with experts this rank has (``Policy.route_layers``).
        backend: the fleet, task and verifier of the main rank; None on the others.
        stop: ends ``next_batch`` without a batch.
        state: a result of ``state`` to continue from.
    """

    def __init__(
        self,
        run: Run,
        mesh: Mesh,
        route_layers: Sequence[int],
        backend: RolloutBackend | None,
        stop: StopSignal,
        state: Json | None = None,
    ) -> None:
        self._run, self._world, self._stop = run, mesh.world, stop
        self._distribution = TokenDistribution(mesh, route_layers)
        self._batch: Batch | None = None
        self._stream: Stream | None = None
        if backend is not None:
            self._stream = Stream(run, backend.fleet, backend.task, state, backend.verifier)
        self.samples = StepSamples()
        """The samples of the newest batch."""

    def next_batch(self, step: int) -> Batch | None:
        """Return the outline of a step's batch, the same on every rank; None if a stop was requested.

        It has the per-response columns only: lengths, rewards, advantages, ids and counts.
        """
        collect_garbage()
        self._batch = self._wait_for_batch(step)
        outline = None if self._batch is None else self._batch.outline()
        sent = None if outline is None else {"lengths_B": outline.lengths_B, **outline.columns}
        columns = broadcast_tensors(sent, 0, self._world.device)
        return None if columns is None else Batch(columns.pop("lengths_B"), columns)

    def fetch(self, plans: Sequence[MinibatchPlan]) -> list[Minibatch]:
        """Return, for each mini-batch of the newest step, this replica's responses with their tokens."""
        batch, self._batch = self._batch, None
        if batch is None:
            return self._distribution.fetch(plans, None, None)
        return self._distribution.fetch(plans, columns_of(batch), schema_of(batch.columns))

    def _wait_for_batch(self, step: int) -> Batch | None:
        """Return the step's batch on the main rank, for which the others wait in host memory and get None."""
        if self._stream is None:
            main_rank().wait()
            return None
        with main_rank().waits_for(f"the samples of step {step}", self._stream.progress):
            batch = self._sample(self._stream, step)
        main_rank().release()
        return batch

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
        counted = CountedWeights(weights)
        with main_rank().waits_for(f"the push of weights version {version}", lambda: counted.count):
            push_weights(self._run, self._world, counted, version, self._stream.fleet if self._stream else None)
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
