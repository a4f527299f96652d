"""The embedded server's side of torch.distributed groups that weights come through: CPU and gloo alone."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_rl.inference_server.requests import BadRequest
from megatron_rl.weights.weight_group import Meeting, Pair, empty

JOIN_SECONDS = 60.0
"""For the other side to come, and for a bucket to arrive."""


class Joining(BaseModel):
    """The body of ``POST /init_weights_update_group``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    master_address: str
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=2)]
    group_name: Annotated[str, Field(min_length=1)]
    backend: Literal["gloo"]


class Bucket(BaseModel):
    """The body of ``POST /update_weights_from_distributed``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    names: list[str]
    dtypes: list[Literal["float64", "float32", "bfloat16", "float16"]]
    shapes: list[list[Annotated[int, Field(ge=0)]]]
    group_name: str


class WeightGroups:
    """The groups that this server is in, by name."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}

    async def join(self, body: Mapping[str, object]) -> None:
        """Join a group; returns when all have come."""
        try:
            asked = Joining.model_validate(body)
        except ValidationError as error:
            raise BadRequest(_first(error)) from error
        try:
            pair = await asyncio.to_thread(_open, asked)
        except RuntimeError as error:
            raise BadRequest(f"could not join the group {asked.group_name!r}: {error}") from error
        self._pairs[asked.group_name] = pair

    async def receive(self, body: Mapping[str, object]) -> list[tuple[str, Tensor]]:
        """Return the tensors of a bucket when they have come."""
        try:
            bucket = Bucket.model_validate(body)
        except ValidationError as error:
            raise BadRequest(_first(error)) from error
        if bucket.group_name not in self._pairs:
            raise BadRequest(f"no group {bucket.group_name!r}: init_weights_update_group comes first")
        described = list(zip(bucket.names, bucket.dtypes, bucket.shapes, strict=False))
        if not len(bucket.names) == len(bucket.dtypes) == len(bucket.shapes):
            raise BadRequest(f"{len(bucket.names)} names, {len(bucket.dtypes)} dtypes, {len(bucket.shapes)} shapes")
        tensors = [(name, empty(shape, dtype, torch.device("cpu"))) for name, dtype, shape in described]
        works = self._pairs[bucket.group_name].broadcast([tensor for _, tensor in tensors])
        try:
            await asyncio.to_thread(lambda: [work.wait() for work in works])
        except RuntimeError as error:
            self.leave(bucket.group_name)
            raise BadRequest(f"the tensors did not come: {error}") from error
        return tensors

    def leave(self, name: str) -> None:
        """Leave a group."""
        if name not in self._pairs:
            raise BadRequest(f"no group {name!r}")
        self._pairs.pop(name).close()


def _open(asked: Joining) -> Pair:
    store = Meeting.at(asked.master_address, asked.master_port, JOIN_SECONDS)
    return Pair.open(store, asked.group_name, asked.rank_offset, asked.world_size, "gloo")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {str(first['input'])[:60]!r}"
