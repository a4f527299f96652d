"""Batches for the trainer, and weights for the fleet."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.data.minibatch import Minibatch, MinibatchPlan
from megatron_rl.data.step import StepSamples
from megatron_rl.data.types import Batch
from megatron_rl.distributed.collectives import broadcast_tensors
from megatron_rl.distributed.main_rank import main_rank
from megatron_rl.distributed.mesh import Mesh
from megatron_rl.models.served_weights import ServedWeights
from megatron_rl.rollout.buffer_state import Json
from megatron_rl.rollout.controller_client import ControllerClient
from megatron_rl.rollout.distribution import Schema, TokenDistribution
from megatron_rl.rollout.evaluation import evaluation_due
from megatron_rl.rollout.fleet_setup import EncodableWeights, PolicyWeights, push_weights, stage_rank
from megatron_rl.rollout.gauges import Gauge
from megatron_rl.rollout.service import SampledStep
from megatron_rl.rollout.stop import StopSignal
from megatron_rl.util.garbage import collect_garbage


class CountedWeights:
    """The policy's weights, with the number of tensors that were read so far: the progress of a push."""

    def __init__(self, weights: PolicyWeights) -> None:
        self._weights, self.count = weights, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._counted(self._weights)

    def owned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that this rank owns."""
        yield from self._counted(self._weights.owned_tensors())

    def stage_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of this rank's pipeline stage on its first rank."""
        yield from self._counted(self._weights.stage_tensors())

    def _counted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for tensor in tensors:
            self.count += 1
            yield tensor


class RolloutController:
    """Gives every rank the outline of each step and the tokens of its own responses, and pushes weights to the fleet.

    Every rank has one and calls its methods in the same order. The main rank, which alone has a client, asks the
    controller's process for samples and sends weights; the other ranks receive, and help to gather the weights.

    Args:
        run: the configuration.
        mesh: this rank's groups.
        route_layers: which of the layers with experts this rank has (``Policy.route_layers``).
        client: the main rank's connection to the controller; None on the others.
        stop: whether the main rank was asked to stop, after which no groups are requested.
    """

    def __init__(
        self, run: Run, mesh: Mesh, route_layers: Sequence[int], client: ControllerClient | None, stop: StopSignal
    ) -> None:
        self._run, self._world, self._client, self._stop = run, mesh.world, client, stop
        self._stage = None if client else stage_rank(run, mesh)
        self._served = ServedWeights.of(run)
        self._distribution = TokenDistribution(mesh, route_layers)
        self._schema: Schema | None = None
        self.samples = StepSamples()
        """The samples of the newest batch."""

    def next_batch(self, step: int) -> Batch | None:
        """Return the outline of a step's batch, the same on every rank; None if a stop was requested.

        It has the per-response columns only: lengths, rewards, advantages, ids and counts.
        """
        collect_garbage()
        sampled = self._wait_for_batch(step)
        sent = None if sampled is None else {"lengths_B": sampled.outline.lengths_B, **sampled.outline.columns}
        columns = broadcast_tensors(sent, 0, self._world.device)
        return None if columns is None else Batch(columns.pop("lengths_B"), columns)

    def fetch(self, plans: Sequence[MinibatchPlan]) -> list[Minibatch]:
        """Return, for each mini-batch of the newest step, this replica's responses with their tokens."""
        if self._client is None:
            return self._distribution.fetch(plans, None, None)
        minibatches = self._distribution.fetch(plans, self._client.columns, self._schema)
        self._client.forget_columns()
        return minibatches

    def _wait_for_batch(self, step: int) -> SampledStep | None:
        """Return the step on the main rank, for which the others wait in host memory and get None."""
        if self._client is None:
            main_rank().wait()
            return None
        with main_rank().waits_for(f"the samples of step {step}", self._client.progress):
            sampled = self._client.next_batch(step)
        if sampled is not None:
            self.samples, self._schema = sampled.samples, sampled.schema
        main_rank().release()
        return sampled

    def push_weights(self, weights: EncodableWeights, version: int) -> None:
        """Give all servers these weights; with a lag, also request the groups that they may sample ahead."""
        is_plain = self._served.encoding is None
        counted = CountedWeights(weights if is_plain else weights.encoded(self._served.encoded))
        with main_rank().waits_for(f"the push of weights version {version}", lambda: counted.count):
            push = self._client.push if self._client else None
            push_weights(self._run, self._world, counted, version, push, self._stage)
        idle = self._run.rollout.max_lag == 0 or evaluation_due(self._run, version) or self._stop.requested
        if self._client and not idle:
            self._client.request_groups(version)

    def close(self) -> None:
        """Close the connections of this rank to the servers; those of the main rank are its client's."""
        if self._stage is not None:
            self._stage.close()

    def gauges(self) -> Iterable[Gauge]:
        """Return the current state of the queue and the servers; nothing on the other ranks. Callable in any thread."""
        return self._client.gauges() if self._client else ()

    def fleet_seconds(self) -> float:
        """Return how long a server has had requests so far, mean over the servers."""
        return self._client.busy_seconds if self._client else 0.0

    def state(self) -> Json:
        """Return what a checkpoint must contain to continue with the same samples; empty on the other ranks."""
        return self._client.state() if self._client else {}
