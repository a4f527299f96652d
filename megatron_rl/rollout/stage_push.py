"""Pushes of weights by one rank per pipeline stage: the senders, and the collectives between them and the main rank.

every rank: the plan of the push, from the main rank -> the first rank of each stage sends the stage's tensors
-> the results, to the main rank
"""

from collections.abc import Iterable
from typing import Any, cast

from pydantic import TypeAdapter
from torch import Tensor

from megatron_rl.distributed.collectives import broadcast_json, gather_json
from megatron_rl.distributed.mesh import World
from megatron_rl.distributed.turns import Turns
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.peer import error_from_json, error_to_json
from megatron_rl.weights.stage_sender import StagePlan, StageResult, StageSender
from megatron_rl.weights.stages import StageTransport
from megatron_rl.weights.transport import WeightServer, send_buckets

_PLAN = TypeAdapter(StagePlan)


class StageClients:
    """The clients of one stage's sender, made when they are needed."""

    def __init__(self, client: type[Client], timeout_seconds: float) -> None:
        self._client, self._timeout_seconds = client, timeout_seconds
        self._clients: dict[str, Client] = {}

    def __call__(self, url: str) -> WeightServer:
        """Return the client of a server."""
        if url not in self._clients:
            self._clients[url] = self._client(url, None, self._timeout_seconds)
        return self._clients[url]

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()


def stage_transport(
    world: World, bucket_bytes: int, client: type[Client], timeout_seconds: float, index: int, stages: int
) -> StageTransport:
    """Return the transport of the sender of a stage."""
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    clients = StageClients(client, timeout_seconds)

    def announce(plan: StagePlan) -> None:
        broadcast_json(_PLAN.dump_python(plan, mode="json"), 0, world.device)

    def exchange(result: StageResult) -> list[StageResult]:
        return [_result_from_json(fields) for fields in gather_json(_result_to_json(result), world.device) if fields]

    return StageTransport(
        bucket_bytes,
        StageSender(clients, backend, world.device, timeout_seconds, index),
        announce,
        exchange,
        Turns("weight stages", index, stages),
    )


class StageRank:
    """A rank other than the main one in pushes by stages; keeps what its stage's sender keeps from push to push."""

    def __init__(self, world: World, transport: StageTransport, *, is_sender: bool) -> None:
        self._world, self._transport, self._is_sender = world, transport, is_sender
        self._loop: LoopThread | None = LoopThread("weights of a stage") if is_sender else None

    def push(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send the tensors of this rank's stage to the servers, or help to gather them; collective."""
        plan = _PLAN.validate_python(broadcast_json(None, 0, self._world.device))
        if self._loop is None:
            for _ in named_tensors:  # take part in the collectives
                pass
            gather_json(None, self._world.device)
            return
        transport = self._transport
        transport.sender.begin(plan)
        transport.wait_turn(plan)
        send_buckets(self._loop.start, transport.send, transport.buckets(named_tensors), transport.in_flight)
        transport.end_turn(plan)
        transport.exchange(transport.sender.result)

    def close(self) -> None:
        """Close what is kept from push to push."""
        if self._loop is not None:
            self._loop.call(self._transport.close())
            self._loop.close()
            self._loop = None


def _result_to_json(result: StageResult) -> dict[str, Any]:
    failed = {url: error_to_json(error) for url, error in result.failed.items()}
    return {"sums": result.sums, "hashes": result.hashes, "num_bytes": result.num_bytes, "failed": failed}


def _result_from_json(value: object) -> StageResult:
    fields = cast(dict[str, Any], value)
    sums, hashes = ({name: (a, b) for name, (a, b) in fields[key].items()} for key in ("sums", "hashes"))
    errors = {url: error_from_json(error) for url, error in fields["failed"].items()}
    failed = {url: e if isinstance(e, RolloutError) else RolloutError(str(e)) for url, e in errors.items()}
    return StageResult(sums, hashes, fields["num_bytes"], failed)
