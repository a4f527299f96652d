"""Which rank this process is, on which device, and which ranks it works with along each axis of the mesh."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rl.distributed import cpu
from megatron_rl.distributed.collectives import Group, group_rank, group_size
from megatron_rl.errors import ConfigError


@dataclass(frozen=True)
class World:
    """All ranks of the trainer, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that talks to the fleet and writes the run folder."""
        return self.rank == 0


@dataclass(frozen=True)
class Mesh:
    """The process groups of this rank along each axis; None would mean an axis of size one, megatron always makes one.

    Attributes:
        world: all ranks.
        tensor: ranks that share each matrix and the vocabulary.
        pipeline: ranks that share the layers.
        context: ranks that share each sequence.
        data: ranks that hold the same shard of the dense weights and the same part of each sequence.
        expert_tensor, expert, expert_data: the same for the experts.
        experts: ranks that together hold all experts of a layer once; those of ``expert_tensor`` follow each other.
    """

    world: World
    tensor: Group
    pipeline: Group
    context: Group
    data: Group
    expert_tensor: Group
    expert: Group
    expert_data: Group
    experts: Group

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks that hold the last layers and the output head."""
        return group_rank(self.pipeline) == group_size(self.pipeline) - 1

    @property
    def reports_tokens(self) -> bool:
        """True on exactly one rank for every token: the last stage's first tensor rank."""
        return self.is_last_stage and group_rank(self.tensor) == 0


def launched_rank() -> tuple[int, int, int] | None:
    """Return (rank, size, local rank) as torchrun or srun set them, or None where nobody launched us as a rank."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "SLURM_STEP_ID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", "0"))
    return None


def task_number() -> int:
    """Return which task of its Slurm step this process is, 0 outside of Slurm."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def on_cuda() -> bool:
    """Return whether this process trains on a GPU: if there is one, unless MEGATRON_RL_DEVICE=cpu."""
    chosen = os.environ.get("MEGATRON_RL_DEVICE", "auto")
    if chosen not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"MEGATRON_RL_DEVICE is {chosen!r}; write auto, cpu or cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "MEGATRON_RL_DEVICE is cuda, but torch sees no CUDA device; install a CUDA build or write cpu"
        )
    return chosen == "cuda" or (chosen == "auto" and torch.cuda.is_available())


def start_world(timeout_seconds: float, deterministic: bool) -> World:
    """Join the other ranks: NCCL on GPUs, gloo on CPU with megatron-core's stand-ins activated.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (or Slurm's task variables).
    """
    launched = launched_rank()
    if launched is None:
        raise ConfigError("this process is no trainer rank: RANK and WORLD_SIZE are not set; use `megatron-rl train`")
    rank, size, local_rank = launched
    if deterministic:
        for name, value in DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # before CUDA, NCCL and transformer-engine read them
    device, backend = _prepare_device(local_rank)
    make_deterministic(deterministic, device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # matrix products: a workspace for each stream
    "NCCL_ALGO": "^NVLS",  # sums in the switch come in any order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # transformer-engine's attention
}
"""What libraries on GPUs want to hear before they start; a value that is set already stays."""


def make_deterministic(deterministic: bool, device: torch.device) -> None:
    """Make torch's operations give equal bits in every run, or stop doing so.

    An operation that cannot is an error on a GPU, which names it: torch's attention is deterministic only where such
    operations are errors and not mere warnings. Fresh memory is not filled first, which torch would do as well.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type != "cuda")
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (not in torch's stubs)


def lone_world() -> World:
    """Make this process the only rank there is; it listens on no port."""
    device, backend = _prepare_device(0)
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(0, 1, device)


def _prepare_device(local_rank: int) -> tuple[torch.device, str]:
    """Return this rank's device, ready to be used, and the backend that talks between such devices."""
    if on_cuda():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, "nccl"
    cpu.activate()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return torch.device("cpu"), "gloo"
