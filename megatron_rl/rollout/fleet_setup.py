"""The fleet that a configuration asks for: servers of our own, or running ones, and the carrier of weights to them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.distributed.collectives import gather_json
from megatron_rl.distributed.mesh import World
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.router import router_process
from megatron_rl.fleet.servers import servers_of
from megatron_rl.fleet.turns import Codec, Turns
from megatron_rl.fleet.vllm import VllmFleet
from megatron_rl.policy.hf_weights import PARTS
from megatron_rl.tasks.environments import ChatTokenizer, chat_wrap, find_environment
from megatron_rl.weights.disk import DiskTransport, write_rank_files
from megatron_rl.weights.distributed import DistributedTransport
from megatron_rl.weights.ipc import IpcTransport
from megatron_rl.weights.shared_memory import can_share_memory
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import WeightTransport
from megatron_rl.weights.weight_group import Backend


class Chat(Codec, ChatTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that a fleet needs."""


def open_fleet(run: Run, world: World, tokenizer: Chat) -> Fleet:
    """Start or find the servers and wait until all are healthy.

    Raises:
        ConfigError: servers of this engine cannot be started from here.
        RolloutError: one did not become healthy.
    """
    rollout = run.rollout
    patience = Timeouts(
        request_timeout_seconds=rollout.request_timeout_seconds,
        start_timeout_seconds=rollout.start_timeout_seconds,
        attempts=rollout.attempts,
    )
    servers = servers_of(run)
    carrier = _carrier(run, world)
    # Disk has a copy already. With the distributed carrier no process shall ever hold the whole model, nor a GPU twice.
    keeps = isinstance(carrier, TensorTransport) or (isinstance(carrier, IpcTransport) and world.device.type == "cpu")
    decode = partial(tokenizer.decode, skip_special_tokens=True) if rollout.at_push == "resubmit" else None
    kind = VllmFleet if rollout.engine == "vllm" else Fleet
    rows, requests = rollout.rows_per_request, rollout.requests_per_server
    fleet = kind(servers, carrier, patience, rows, requests, keeps, decode=decode)
    fleet.turns = turns_of(run, tokenizer)
    if rollout.router is not None and len(servers) > 1:
        try:
            fleet.use_router(router_process(rollout.router, Path(run.log.path) / "servers" / "router.log"))
        except BaseException:
            fleet.close()
            raise
    return fleet


def turns_of(run: Run, tokenizer: Chat) -> Turns | None:
    """Return how responses of several turns are made; None if they have one."""
    section = run.environment
    if not section.name:
        return None
    wrap = chat_wrap(tokenizer, section.role) if section.role else str
    return Turns(find_environment(section.name), tokenizer, wrap, section.max_turns, run.reward.seconds)


def carrier_name(run: Run, *, on_gpus: bool) -> Literal["tensor", "disk", "distributed", "ipc"]:
    """Return how weights travel: as configured, or what suits the engine and the trainer's device."""
    if run.weights.carrier != "auto":
        return run.weights.carrier
    if run.rollout.engine == "vllm":
        return "disk"
    if (
        run.rollout.engine == "embedded"
        and not (on_gpus or run.rollout.urls or run.rollout.registry)
        and can_share_memory()
    ):
        return "ipc"  # the servers are children of this process; on a GPU it was not run yet
    return "distributed" if run.rollout.engine == "sglang" and on_gpus else "tensor"


def weights_folder(run: Run) -> Path:
    """Return where the disk carrier keeps versions."""
    return Path(run.log.path) / "weights"


class Weights(Protocol):
    """The policy's weights under Hugging Face names; both ways are collective."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors on the main rank, none elsewhere."""
        ...

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that this rank speaks for."""
        ...


def writes_shares(run: Run, world: World) -> bool:
    """Return whether every rank writes its own tensors."""
    return carrier_name(run, on_gpus=world.device.type == "cuda") == "disk"


def write_own(run: Run, world: World, weights: Weights, version: int) -> None:
    """Write this rank's tensors for the push that the main rank makes meanwhile."""
    carrier = _carrier(run, world)
    gather = partial(gather_json, device=world.device)
    write_rank_files(weights_folder(run), version, world.rank, carrier.buckets(weights.own()), gather)


def part_bytes(run: Run) -> int:
    """Return the size of what is sent at once: the other parts of a bucket are still being put together."""
    return run.weights.bucket_bytes // PARTS


def _carrier(run: Run, world: World) -> WeightTransport:
    on_gpus, patience = world.device.type == "cuda", run.rollout.request_timeout_seconds
    name, size = carrier_name(run, on_gpus=on_gpus), part_bytes(run)
    if name == "disk":
        gather = partial(gather_json, device=world.device)
        carrier: WeightTransport = DiskTransport(size, weights_folder(run), Path(run.model.path), gather=gather)
    elif name == "distributed":
        backend: Backend = "nccl" if on_gpus else "gloo"
        carrier = DistributedTransport(size, backend, world.device, min(patience, Timeouts().control_timeout_seconds))
    elif name == "ipc":
        carrier = IpcTransport(size, world.device)
    else:
        carrier = TensorTransport(size)
    if run.rollout.dtype is not None:
        carrier.dtype = getattr(torch, run.rollout.dtype)
    return carrier
