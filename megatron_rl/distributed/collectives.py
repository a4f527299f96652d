"""Collectives that are no-ops without a process group, so that callers need no special case for a single rank."""

import json

import torch
import torch.distributed as dist
from torch import Tensor

RankGroup = dist.ProcessGroup | None
"""Ranks that take part in a collective; None: this rank only."""


def group_size(group: RankGroup) -> int:
    """Return the number of ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: RankGroup) -> int:
    """Return this rank's index in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


@torch.no_grad()
def sum_over(group: RankGroup, tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, same shape, detached. All shapes must be equal."""
    if group_size(group) == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def max_over(group: RankGroup, tensor: Tensor) -> Tensor:
    """Return the element-wise maximum of the ranks' tensors, same shape, detached. All shapes must be equal."""
    if group_size(group) == 1:
        return tensor.detach()
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


@torch.no_grad()
def gather_over(group: RankGroup, tensor: Tensor) -> Tensor:
    """Return the ranks' tensors stacked in rank order, [ranks, ...], detached. All shapes must be equal."""
    if group_size(group) == 1:
        return tensor.detach()[None]
    stacked = tensor.new_empty(group_size(group), *tensor.shape)
    dist.all_gather_into_tensor(
        stacked.flatten(0, 1) if tensor.dim() else stacked, tensor.detach().contiguous(), group=group
    )
    return stacked


def broadcast_tensor(
    tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device
) -> Tensor:
    """Return the source rank's tensor on every rank of the world, on the CPU. Other ranks' ``tensor`` is ignored."""
    if dtype is torch.bool:
        sent = None if tensor is None else tensor.to(torch.uint8)
        return broadcast_tensor(sent, shape, torch.uint8, source, device).to(torch.bool)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert tensor is not None
        return tensor
    sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    dist.broadcast(sent, src=source)
    return sent.cpu()


def broadcast_json(value: object, source: int, device: torch.device) -> object:
    """Return the source rank's JSON value on every rank of the world. Other ranks' ``value`` is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    is_source = dist.get_rank() == source
    size = broadcast_tensor(torch.tensor([len(text)]) if is_source else None, (1,), torch.int64, source, device)
    sent = broadcast_tensor(text if is_source else None, (int(size),), torch.uint8, source, device)
    return json.loads(sent.numpy().tobytes())


def gather_json(value: object, device: torch.device) -> list[object]:
    """Return every rank's JSON value, in rank order, on every rank."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [broadcast_json(value if rank == source else None, source, device) for source in range(size)]
