"""Weights from one rank of every pipeline stage: each sends the tensors of its stage, all at the same time.

    main rank: begin (every server opens an update) -> open: every sender gets the plan of the push
    every stage: gathers a bucket while the one before is sent (``stage_sender.py``)
    main rank: join: the checksums and failures of all stages -> end of the update, comparison, version

A server that failed in one stage gets no version, whatever it received of the others. Tensors that have not changed
since the newest push are not sent if every server has that push; their checksums are compared all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_rl.weights.checksum import SHORT_SHA256_DIGITS, SUM64
from megatron_rl.weights.stage_sender import StagePlan, StageResult, StageSender, merge_results
from megatron_rl.weights.transport import (
    Bucket,
    Checksums,
    NamedTensors,
    UpdateReport,
    WeightReceiver,
    WeightServer,
    WeightTransport,
    WeightUpdate,
    converted,
)

IN_FLIGHT = 3
"""Buckets of a stage at a time: two are sent, so that the link is never idle, while one is gathered."""


class StageTurns(Protocol):
    """Turns of the senders, for servers that handle one request at a time, in different orders of the stages."""

    def wait(self) -> None:
        """Wait for the turn of this process's stage."""

    def end(self) -> None:
        """Let the next stage begin."""


def _alone(result: StageResult) -> list[StageResult]:
    return [result]


@dataclass
class StageTransport(WeightTransport):
    """The sender of a stage; on the main rank, whose stage is the first one, also the plan of every push.

    Attributes:
        bucket_bytes: maximum size of a bucket.
        sender: the stage's sender.
        announce: sends the plan to the other ranks; collective.
        exchange: returns the results of all stages, given this one's; collective.
        turns: the order of the stages, if the servers do not receive streams; None: there is one stage.
    """

    bucket_bytes: int
    sender: StageSender
    announce: Callable[[StagePlan], None] = lambda _: None
    exchange: Callable[[StageResult], list[StageResult]] = _alone
    turns: StageTurns | None = None
    in_flight: int = IN_FLIGHT
    plan: StagePlan = field(default_factory=lambda: StagePlan(0, (), None))
    updated: frozenset[str] = frozenset()
    """Servers that have the newest push."""

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update of these servers."""
        update = _StageUpdate(list(servers), version, transport=self)
        await update.for_each_server(update.examine)
        await update.for_each_server(lambda server: server.begin_update())
        receivers = [update.receivers[server.url] for server in update.servers]
        has_newest = all(update.versions[server.url] == str(self.plan.version) for server in update.servers)
        is_known = has_newest and self.updated.issuperset(server.url for server in update.servers)
        self.plan = StagePlan(version, receivers, self.plan.version if is_known else None)
        self.updated = frozenset()
        self.sender.begin(self.plan)
        return update

    def open(self) -> None:
        """Send the plan to the other ranks; collective."""
        self.announce(self.plan)
        self.wait_turn(self.plan)

    def wait_turn(self, plan: StagePlan) -> None:
        """Wait until this stage may send."""
        if self.turns is not None and not plan.is_streamed:
            self.turns.wait()

    def end_turn(self, plan: StagePlan) -> None:
        """Let the next stage send."""
        if self.turns is not None and not plan.is_streamed:
            self.turns.end()

    async def send(self, bucket: Bucket) -> None:
        """Send a bucket of this stage and empty it."""
        await self.sender.send(bucket)

    def join(self, update: WeightUpdate) -> None:
        """Add what the other stages sent; collective."""
        assert isinstance(update, _StageUpdate)
        self.end_turn(self.plan)
        update.add(merge_results(self.exchange(self.sender.result)))

    async def close(self) -> None:
        """Close what the stage's sender keeps from push to push."""
        await self.sender.close()

    def _converted(self, tensor: Tensor) -> Tensor:
        return converted(tensor, self.dtype)


@dataclass
class _StageUpdate(WeightUpdate):
    algorithm: ClassVar[str] = SUM64
    transport: StageTransport = field(kw_only=True)
    receivers: dict[str, WeightReceiver] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hashes: Checksums = field(default_factory=dict)

    async def examine(self, server: WeightServer) -> None:
        """Ask a server how it receives weights, and which it has."""
        self.receivers[server.url] = await server.receiver()
        self.versions[server.url] = await server.version()

    async def send(self, bucket: NamedTensors) -> None:
        """Send a bucket of the first stage; empties a list."""
        await self.transport.sender.send(bucket)

    def add(self, result: StageResult) -> None:
        """Add the results of all stages; servers that failed in any of them leave the update."""
        self.sums |= result.sums
        self.hashes |= result.hashes
        self.num_bytes += result.num_bytes
        self.failed = {**result.failed, **self.failed}
        self.servers = [server for server in self.servers if server.url not in self.failed]

    async def finish(self) -> UpdateReport:
        """Apply the new weights, compare checksums, and set the version."""
        report = await super().finish()
        self.transport.updated = frozenset(server.url for server in self.servers)
        return report

    async def _send(self, bucket: NamedTensors) -> None:
        raise AssertionError(f"{len(bucket)} tensors bypass the stage's sender")

    async def _apply(self) -> None:
        await self.for_each_server(lambda server: server.end_update())

    def _expected(self, name: str, algorithm: str) -> Sequence[str]:
        if algorithm == self.algorithm:
            return self.sums[name][:1]
        return [value[:SHORT_SHA256_DIGITS] for value in self.hashes.get(name, ())]
