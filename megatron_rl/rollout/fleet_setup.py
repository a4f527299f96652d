"""Opens the fleet that a configuration describes, and pushes the policy's weights to it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_rl.config.schema import PUSH_BUFFERS, Run
from megatron_rl.data.types import Response
from megatron_rl.distributed.collectives import gather_json, group_rank
from megatron_rl.distributed.mesh import Mesh, World
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.quantization import FormJudge
from megatron_rl.fleet.registry import Registry
from megatron_rl.fleet.router import router_process
from megatron_rl.fleet.servers import servers_of
from megatron_rl.fleet.turns import MultiTurn
from megatron_rl.fleet.vllm import VllmClient
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.served_weights import ServedWeights, served_folder
from megatron_rl.rollout.stage_push import StageRank, stage_transport
from megatron_rl.tasks.environments import find_environment
from megatron_rl.tasks.response_text import ResponseText
from megatron_rl.tasks.reward import reads_tags
from megatron_rl.tasks.turn_format import TurnTokenizer, find_turn_format
from megatron_rl.weights.disk import DiskTransport, write_rank_files
from megatron_rl.weights.distributed import DistributedTransport
from megatron_rl.weights.ipc import IpcTransport
from megatron_rl.weights.shared_memory import can_share_memory
from megatron_rl.weights.stages import IN_FLIGHT, StageTransport
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import WeightTransport

MAX_FIXED_BATCH = 256
"""Maximum number of sequences in a request to an embedded server that must repeat bit for bit."""


Push = Callable[[Iterable[tuple[str, Tensor]], int], object]
"""Sends named tensors to the servers as weights of this version."""


class FleetTokenizer(TurnTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that a fleet needs."""


class PolicyWeights(Protocol):
    """The policy's weights under Hugging Face names; both iterations are collective."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors on the main rank, none on the others."""
        ...

    def owned_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that this rank owns; the union over ranks is the full model without duplicates."""
        ...

    def stage_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of this rank's pipeline stage on its first rank, none on the others."""
        ...


class EncodableWeights(PolicyWeights, Protocol):
    """Weights that can be encoded where they are."""

    def encoded(self, encode: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]) -> PolicyWeights:
        """Return the tensors that ``encode`` makes of these, on the rank that owns them."""
        ...


def open_fleet(
    run: Run,
    tokenizer: FleetTokenizer,
    transport: WeightTransport,
    *,
    keep_weights: bool = False,
    pushes: bool = True,
) -> Fleet:
    """Start or find the servers, and wait until all are healthy.

    Args:
        run: the configuration.
        tokenizer: tokenizer of the model.
        transport: brings weights to the servers.
        keep_weights: whether this process keeps a copy of the weights for servers that come back between two pushes.
        pushes: whether weights will be pushed, which servers that hold them in another form cannot take.

    Raises:
        ConfigError: the run cannot start servers of this engine.
        RolloutError: a server did not become healthy, or holds weights in another form than the pushes send.
    """
    rollout = run.rollout
    servers = servers_of(run)
    router = None
    if rollout.router is not None and len(servers) > 1:
        router = router_process(rollout.router, Path(run.log.path) / "servers" / "router.log")
    fleet = Fleet.open(
        servers,
        transport,
        Timeouts(
            **{field.name: getattr(rollout, field.name) for field in fields(Timeouts)},
        ),
        client=client_class(run),
        sequences_per_server=rollout.sequences_per_server,
        sequences_per_request=sequences_per_request(run),
        keep_weights=keep_weights,
        decode=partial(tokenizer.decode, skip_special_tokens=True) if rollout.at_push == "resubmit" else None,
        multi_turn=_multi_turn(run, tokenizer),
        text_of=_text_of(run, tokenizer),
        router=router,
        receivers=rollout.receivers,
        registry=Registry(Path(rollout.registry)) if rollout.registry else None,
        judge=form_judge(run) if pushes else None,
    )
    fleet.sync.pause_at = run.weights.pause
    fleet.vocabulary = family_of(read_hf_config(Path(run.model.path))).vocab_size
    return fleet


def form_judge(run: Run) -> FormJudge:
    """Return what refuses servers that hold their weights in another form than the run's pushes send."""
    served = ServedWeights.of(run)
    return lambda held: served.problem(held.method, held.settings)


def starts_with_push(run: Run) -> bool:
    """Return whether the servers may have other weights than the policy before the first step.

    They may if the run resumes from a checkpoint, if it did not start the servers, or if these load another folder.
    """
    rollout = run.rollout
    return run.train.resume or bool(rollout.urls or rollout.registry or rollout.model_path)


def sequences_per_request(run: Run) -> int:
    """Return the size of the fixed batches of a server that must repeat bit for bit; 1: every sequence by itself."""
    rollout = run.rollout
    return 1 if rollout.engine != "embedded" or rollout.max_lag else min(MAX_FIXED_BATCH, rollout.sequences_per_server)


def client_class(run: Run) -> type[Client]:
    """Return the client class of the configured engine."""
    return VllmClient if run.rollout.engine == "vllm" else Client


def transport_name(run: Run, *, on_gpus: bool) -> Literal["stages", "tensor", "disk", "distributed", "ipc"]:
    """Return the configured weight transport; ``auto`` depends on the engine and the trainer's device."""
    if run.weights.carrier != "auto":
        return run.weights.carrier
    if run.rollout.engine == "vllm":
        return "disk"
    if run.rollout.engine == "embedded" and not (on_gpus or run.rollout.urls or run.rollout.registry):
        return "ipc" if can_share_memory() else "tensor"  # the servers are children of this process
    return "distributed" if run.rollout.engine == "sglang" and on_gpus else "tensor"


def weights_folder(run: Run) -> Path:
    """Return the folder in which the disk transport keeps weight versions."""
    return Path(run.log.path) / "weights"


def bucket_bytes(run: Run) -> int:
    """Return the size of a transport's buckets: the other parts of ``weights.bucket_bytes`` hold the next tensors."""
    return run.weights.bucket_bytes // PUSH_BUFFERS


def push_weights(
    run: Run,
    world: World,
    weights: PolicyWeights,
    version: int,
    push: Push | None,
    stage: StageRank | None = None,
) -> None:
    """Push the policy's weights to the fleet; collective. Only the main rank has ``push``, only others ``stage``."""
    name = transport_name(run, on_gpus=world.device.type == "cuda")
    if push is not None:
        sent = {"disk": weights.owned_tensors, "stages": weights.stage_tensors}.get(name, weights.__iter__)
        push(sent(), version)
    elif stage is not None:
        stage.push(weights.stage_tensors())
    elif name == "disk":
        gather = partial(gather_json, device=world.device)
        buckets = make_transport(run, world).buckets(weights.owned_tensors())
        write_rank_files(weights_folder(run), version, world.rank, buckets, gather)
    else:
        for _ in weights:  # take part in the collectives
            pass


def _multi_turn(run: Run, tokenizer: FleetTokenizer) -> MultiTurn | None:
    section = run.environment
    if not section.name:
        return None
    stop_ids = run.rollout.sampling.stop_token_ids
    decode = ResponseText(tokenizer, stop_ids).decode
    encode = find_turn_format(run.task, section, stop_ids, tokenizer)
    return MultiTurn(find_environment(section.name), decode, encode, section.max_turns, run.reward.seconds)


def _text_of(run: Run, tokenizer: FleetTokenizer) -> Callable[[Response], str] | None:
    """Return what decodes a response of one turn, if rewards look for tags, which may be special tokens."""
    if not reads_tags(run.task, run.reward):
        return None
    texts = ResponseText(tokenizer, run.rollout.sampling.stop_token_ids)
    return lambda response: texts.decode(response.output_ids) if texts.shows(response.output_ids) else response.text


def keeps_weights(transport: WeightTransport, world: World) -> bool:
    """Return whether to keep a copy of the weights for servers that come back between two pushes."""
    # The disk has a copy already. With torch.distributed no process may hold the whole model, nor a GPU two copies.
    return isinstance(transport, TensorTransport) or (
        isinstance(transport, IpcTransport) and world.device.type == "cpu"
    )


def stage_rank(run: Run, mesh: Mesh) -> StageRank | None:
    """Return the part of a rank other than the main one in pushes by stages; None with other transports."""
    world = mesh.world
    if transport_name(run, on_gpus=world.device.type == "cuda") != "stages":
        return None
    transport = make_transport(run, world, stage=group_rank(mesh.pipeline))
    assert isinstance(transport, StageTransport)
    return StageRank(world, transport, is_sender=world.rank == mesh.stage_ranks[0])


def make_transport(run: Run, world: World, stage: int = 0) -> WeightTransport:
    """Return the transport of a process that has the weights of this pipeline stage, or all."""
    on_gpus, size = world.device.type == "cuda", bucket_bytes(run)
    name = transport_name(run, on_gpus=on_gpus)
    transport: WeightTransport
    if name == "disk":
        gather = partial(gather_json, device=world.device)
        transport = DiskTransport(size, weights_folder(run), served_folder(run), gather=gather)
    elif name == "distributed":
        timeout = run.rollout.control_timeout_seconds
        transport = DistributedTransport(size, "nccl" if on_gpus else "gloo", world.device, timeout)
    elif name == "ipc":
        transport = IpcTransport(size, world.device)
    elif name == "stages":
        # Of the fifth that is for tensors to send, each bucket in flight needs its part, and one is copied meanwhile.
        part, timeout = size // (IN_FLIGHT + 1), run.rollout.control_timeout_seconds
        stages = run.parallel.pipeline if world.size > 1 else 1  # an evaluation has one process
        transport = stage_transport(world, part, client_class(run), timeout, stage, stages)
    else:
        transport = TensorTransport(size)
    if run.rollout.dtype is not None and ServedWeights.of(run).encoding is None:  # which has the type of other tensors
        transport.dtype = getattr(torch, run.rollout.dtype)
    return transport
