"""The receiving side of weights through torch.distributed groups: CPU and gloo only."""

import asyncio
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest, validated
from megatron_rl.weights.dtypes import DTYPES
from megatron_rl.weights.flat_bucket import FlatBucket, TensorHeader
from megatron_rl.weights.weight_group import Rendezvous, WeightGroup, empty_tensor, run_in_thread

JOIN_SECONDS = 60.0
"""Limit for the other side to join, and for a bucket to arrive."""


class JoinGroupBody(BaseModel):
    """The body of ``POST /init_weights_update_group``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    master_address: str
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=2)]
    group_name: Annotated[str, Field(min_length=1)]
    backend: Literal["gloo"]


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"the type is {name!r}; send one of {', '.join(DTYPES)}")
    return name


class UpdateFromDistributedBody(BaseModel):
    """The body of ``POST /update_weights_from_distributed``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    names: list[str]
    dtypes: list[Annotated[str, AfterValidator(_known_dtype)]]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str
    load_format: Literal["flattened_bucket"] | None = None


class WeightGroups:
    """The groups that this server has joined, by name."""

    def __init__(self, max_elements: int) -> None:
        """Join no group yet; ``max_elements`` is the number of elements of the model's largest tensor."""
        self.max_elements = max_elements
        self._groups: dict[str, WeightGroup] = {}
        self._receiving: dict[str, asyncio.Future[BaseException | None]] = {}
        """Groups in which tensors are being received."""

    async def join(self, body: Mapping[str, object]) -> None:
        """Join a group; return when all ranks have joined."""
        parsed = validated(JoinGroupBody.model_validate, body)
        try:
            group = await asyncio.to_thread(_join, parsed)
        except RuntimeError as error:
            raise BadRequest(f"could not join the group {parsed.group_name!r}: {error}") from error
        self._groups[parsed.group_name] = group

    async def receive(self, body: Mapping[str, object]) -> list[tuple[str, Tensor]]:
        """Receive the tensors of a bucket."""
        bucket = validated(UpdateFromDistributedBody.model_validate, body)
        if bucket.group_name not in self._groups:
            raise BadRequest(f"no group {bucket.group_name!r}: init_weights_update_group comes first")
        if not len(bucket.names) == len(bucket.dtypes) == len(bucket.shapes):
            raise BadRequest(f"{len(bucket.names)} names, {len(bucket.dtypes)} dtypes, {len(bucket.shapes)} shapes")
        entries = zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True)
        headers = [TensorHeader(name, dtype, tuple(shape)) for name, dtype, shape in entries]
        for header in headers:
            if math.prod(header.shape) > self.max_elements:
                raise BadRequest(f"{header.name[:200]} is {list(header.shape)}; no tensor of this model is as large")
        device = torch.device("cpu")
        if bucket.load_format is not None:
            flat = FlatBucket.empty(headers, device)
            await self._broadcast(bucket.group_name, [flat.data])
            return list(flat.tensors())
        tensors = [(header.name, empty_tensor(header.shape, header.dtype, device)) for header in headers]
        await self._broadcast(bucket.group_name, [tensor for _, tensor in tensors])
        return tensors

    async def _broadcast(self, name: str, tensors: list[Tensor]) -> None:
        """Receive tensors; return early if the group is left meanwhile."""
        works, loop = self._groups[name].broadcast(tensors), asyncio.get_running_loop()
        arrived: asyncio.Future[BaseException | None] = loop.create_future()

        def deliver(result: BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: arrived.done() or arrived.set_result(result))

        self._receiving[name] = arrived
        try:
            run_in_thread(lambda: _wait_for(works), deliver)
            error = await arrived
        finally:
            self._receiving.pop(name, None)
        if error is not None:
            self._close(name)
            raise BadRequest(f"the tensors did not arrive: {error}") from error

    def leave(self, name: str) -> None:
        """Leave a group."""
        if name not in self._groups:
            raise BadRequest(f"no group {name!r}")
        if (arrived := self._receiving.get(name)) is not None and not arrived.done():
            arrived.set_result(BadRequest("the group was left"))
        self._close(name)

    def _close(self, name: str) -> None:
        if (group := self._groups.pop(name, None)) is not None:
            group.close()


def _wait_for(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _join(body: JoinGroupBody) -> WeightGroup:
    rendezvous = Rendezvous.connect(body.master_address, body.master_port, JOIN_SECONDS)
    return WeightGroup.open(rendezvous, body.group_name, body.rank_offset, body.world_size, "gloo")
