"""A policy that is a few tensors, to write checkpoints of as fast as the disk takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import World
from megatron_rl.models.hf_mapping.rules import Shard
from megatron_rl.models.sharded_files import ShardedStateReader, StateSlice
from megatron_rl.policy.engine import Policy
from megatron_rl.train.checkpoints import Checkpoints

SIZES = {"model/a": 300_000, "exp_avg/a": 300_000, "model/b": 7}


class Small:
    """Every element of its tensors is the number of updates; they are cut over all ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.updates = rank, size, 0
        self.tensors = {name: torch.zeros(count) for name, count in SIZES.items()}

    def train(self) -> None:
        self.updates += 1
        for tensor in self.tensors.values():
            tensor.fill_(self.updates)

    def sharded_state(self) -> list[tuple[StateSlice, Tensor]]:
        return [(self.place(name), tensor) for name, tensor in self.tensors.items()]

    def place(self, name: str) -> StateSlice:
        return StateSlice(tensor=name, shard=self.rank, shards=self.size, shape=(SIZES[name],))

    def load_sharded_state(self, reader: ShardedStateReader, updates: int, *, same_layout: bool) -> None:
        assert same_layout
        self.updates = updates
        for name, tensor in self.tensors.items():
            tensor.copy_(reader.read(self.place(name), Shard(0)))
            assert bool((tensor == updates).all())


def small(folder: Path, rank: int = 0, size: int = 1, **settings: object) -> tuple[Small, Checkpoints]:
    """Return the policy of a rank and the checkpoints of a run folder."""
    sections: Mapping[str, object] = {"model": {"path": "none"}, "checkpoint": settings, "log": {"path": str(folder)}}
    policy = Small(rank, size)
    run = Run.model_validate(sections)
    return policy, Checkpoints(run, World(rank, size, torch.device("cpu")), cast(Policy, policy))
