"""Rank, device and process groups of this process."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import psutil
import torch
import torch.distributed as dist

from megatron_rl.distributed import cpu
from megatron_rl.distributed.collectives import RankGroup, gather_over, group_rank, group_size
from megatron_rl.distributed.replicas import Replicas
from megatron_rl.errors import ConfigError


@dataclass(frozen=True)
class World:
    """The trainer's ranks.

    Attributes:
        rank: index of this rank.
        size: number of ranks.
        device: device of this rank.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which talks to the fleet and writes the run folder."""
        return self.rank == 0


@dataclass(frozen=True)
class Mesh:
    """This rank's process group along each parallelism axis.

    Attributes:
        world: all ranks.
        tensor: tensor-parallel ranks, which shard matrices and the vocabulary.
        pipeline: pipeline-parallel ranks, which split the layers.
        context: context-parallel ranks, which split each sequence.
        data: data-parallel ranks: same shard of the dense weights, same part of each sequence, different rows.
        expert_tensor: ranks that shard the matrices of one expert.
        expert: expert-parallel ranks, which split the experts of a layer.
        expert_data: ranks with the same shard of the same experts.
        experts: ranks that together hold each expert of a layer once; ranks of one ``expert_tensor`` group are
            consecutive.
        stage: the ranks of this replica and pipeline stage: its tensor-parallel and context-parallel ranks.
        replica: the ranks of this data-parallel replica, for tensors in host memory (gloo).
        replica_stage: the ranks of ``stage``, for tensors in host memory (gloo).
        peers: one rank of each replica, at this rank's place within it, for tensors in host memory (gloo).
    """

    world: World
    tensor: RankGroup
    pipeline: RankGroup
    context: RankGroup
    data: RankGroup
    expert_tensor: RankGroup
    expert: RankGroup
    expert_data: RankGroup
    experts: RankGroup
    stage: RankGroup
    replica: RankGroup
    replica_stage: RankGroup
    peers: RankGroup

    @property
    def replicas(self) -> Replicas:
        """The data-parallel replicas, among the ranks at this rank's place in its replica."""
        return Replicas(self.peers)

    @property
    def leads_replica(self) -> bool:
        """True on the first rank of each replica, which receives its token columns and records its metrics."""
        return group_rank(self.replica) == 0

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks of the last pipeline stage, which hold the output head."""
        return group_rank(self.pipeline) == group_size(self.pipeline) - 1

    @property
    def stage_ranks(self) -> range:
        """The ranks of this pipeline stage in all replicas; megatron-core numbers the stages last."""
        size = self.world.size // group_size(self.pipeline)
        start = group_rank(self.pipeline) * size
        return range(start, start + size)

    @property
    def reports_tokens(self) -> bool:
        """True on exactly one rank per token: tensor-parallel rank 0 of the last pipeline stage."""
        return self.is_last_stage and group_rank(self.tensor) == 0


def host_group(world: World, label: int) -> RankGroup:
    """Return a gloo group of the ranks with the same label, for tensors in host memory. Collective over all ranks."""
    labels = gather_over(dist.group.WORLD, torch.tensor([label], device=world.device)).flatten().tolist()
    mine: RankGroup = None
    for each in sorted(set(labels)):
        ranks = [rank for rank, value in enumerate(labels) if value == each]
        group = cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo"))
        if each == label:
            mine = group
    return mine


def rank_from_environment() -> tuple[int, int, int] | None:
    """Return (rank, number of ranks, local rank) as set by torchrun or srun; None if neither launched this process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0"))
    return None


NODES = "MEGATRON_RL_NODES"
"""Environment variable with ``node=address`` of every node of the job, set by the job script."""


def slurm_address() -> str | None:
    """Return the address of this node that Slurm uses; None outside of a job of ``megatron-rl slurm``."""
    addresses = dict(pair.split("=", 1) for pair in os.environ.get(NODES, "").split())
    return addresses.get(os.environ.get("SLURMD_NODENAME", ""))


def slurm_interface() -> str | None:
    """Return the network interface that has the address of this node that Slurm uses; None if no interface has it.

    By default, gloo listens on the address of the host name, which on many hosts is 127.0.0.1.
    """
    address = slurm_address()
    if address is None:
        return None
    try:
        numeric = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] in numeric for entry in entries):
            return name
    return None


def slurm_task_index() -> int:
    """Return the index of this process in its Slurm step; 0 outside of Slurm."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def on_cuda() -> bool:
    """Return whether this process uses a GPU: if there is one, unless MEGATRON_RL_DEVICE=cpu.

    Raises:
        ConfigError: MEGATRON_RL_DEVICE has an invalid value, or is cuda without a GPU.
    """
    chosen = os.environ.get("MEGATRON_RL_DEVICE", "auto")
    if chosen not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"MEGATRON_RL_DEVICE is {chosen!r}; write auto, cpu or cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "MEGATRON_RL_DEVICE is cuda, but torch sees no CUDA device; install a CUDA build or write cpu"
        )
    return chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available())


def start_world(timeout_seconds: float, deterministic: bool | None) -> World:
    """Initialize torch.distributed: NCCL on GPUs; gloo on CPUs, with the replacements of ``distributed.cpu``.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or Slurm's task variables.

    Args:
        timeout_seconds: timeout of collectives.
        deterministic: whether only deterministic algorithms run; None: on CPUs, not on GPUs (``is_deterministic``).

    Raises:
        ConfigError: this process was not launched as a rank.
    """
    launched = rank_from_environment()
    if launched is None:
        raise ConfigError("RANK and WORLD_SIZE are not set, so this process is not a rank; use `megatron-rl train`")
    rank, size, local_rank = launched
    deterministic = is_deterministic(deterministic, on_gpus=on_cuda())
    if deterministic:
        for name, value in DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before CUDA, NCCL and transformer-engine read them
    device, backend = _prepare_device(local_rank)
    make_deterministic(deterministic, device)
    if interface := slurm_interface():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        # With the device, point-to-point messages use the communicator of all ranks instead of one per pair.
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    return World(rank, size, device)


def is_deterministic(setting: bool | None, *, on_gpus: bool) -> bool:
    """Return ``train.deterministic`` with its default resolved: True on CPUs, False on GPUs.

    With only deterministic algorithms, transformer-engine 2.20 has no fused attention for long packed rows and none at
    all under context parallelism.
    """
    return not on_gpus if setting is None else setting


DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one cuBLAS workspace per stream
    "NCCL_ALGO": "^NVLS",  # reductions in the switch have no fixed order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # transformer-engine's attention
}
"""Environment variables that make GPU libraries deterministic. Values that are already set are not overwritten."""


def make_deterministic(deterministic: bool, device: torch.device) -> None:
    """Turn torch's deterministic algorithms on or off.

    On a GPU, an operation without a deterministic implementation raises an error. Warnings would not suffice, because
    torch's attention is deterministic only in error mode. Uninitialized memory is not filled, to save time.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type != "cuda")
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (not in torch's stubs)


def single_rank_world() -> World:
    """Initialize torch.distributed with this process as the only rank, without opening a port."""
    device, backend = _prepare_device(0)
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(0, 1, device)


def _prepare_device(local_rank: int) -> tuple[torch.device, str]:
    """Initialize this rank's device; return it and the torch.distributed backend for it."""
    if on_cuda():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, "nccl"
    cpu.activate()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return torch.device("cpu"), "gloo"
