"""The receiving side of weights through torch.distributed groups: CPU and gloo only."""

import asyncio
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest, validated
from megatron_rl.weights.weight_group import Rendezvous, WeightGroup, empty_tensor

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


class UpdateFromDistributedBody(BaseModel):
    """The body of ``POST /update_weights_from_distributed``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    names: list[str]
    dtypes: list[Literal["float64", "float32", "bfloat16", "float16"]]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str


class WeightGroups:
    """The groups that this server has joined, by name."""

    def __init__(self, max_elements: int) -> None:
        """Join no group yet; ``max_elements`` is the number of elements of the model's largest tensor."""
        self.max_elements = max_elements
        self._groups: dict[str, WeightGroup] = {}

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
        headers = list(zip(bucket.names, bucket.dtypes, bucket.shapes, strict=False))
        if not len(bucket.names) == len(bucket.dtypes) == len(bucket.shapes):
            raise BadRequest(f"{len(bucket.names)} names, {len(bucket.dtypes)} dtypes, {len(bucket.shapes)} shapes")
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            if math.prod(shape) > self.max_elements:
                raise BadRequest(f"{name[:200]} is {shape}; no tensor of this model is as large")
        tensors = [(name, empty_tensor(shape, dtype, torch.device("cpu"))) for name, dtype, shape in headers]
        works = self._groups[bucket.group_name].broadcast([tensor for _, tensor in tensors])
        try:
            await asyncio.to_thread(lambda: [work.wait() for work in works])
        except RuntimeError as error:
            self.leave(bucket.group_name)
            raise BadRequest(f"the tensors did not arrive: {error}") from error
        return tensors

    def leave(self, name: str) -> None:
        """Leave a group."""
        if name not in self._groups:
            raise BadRequest(f"no group {name!r}")
        self._groups.pop(name).close()


def _join(body: JoinGroupBody) -> WeightGroup:
    rendezvous = Rendezvous.connect(body.master_address, body.master_port, JOIN_SECONDS)
    return WeightGroup.open(rendezvous, body.group_name, body.rank_offset, body.world_size, "gloo")
