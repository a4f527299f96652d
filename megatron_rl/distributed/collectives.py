"""Collectives that are no-ops without a process group, so that callers need no special case for a single rank."""

import json
from collections.abc import Mapping
from typing import cast

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
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    source: int,
    device: torch.device,
    group: RankGroup = None,
) -> Tensor:
    """Return the source's tensor on every rank of the group, on the CPU. Other ranks' ``tensor`` is ignored.

    Args:
        tensor: the tensor on the source.
        shape, dtype: those of the tensor, equal on every rank.
        source: rank within the group.
        device: device that the group's backend communicates from.
        group: the ranks; None: all ranks.
    """
    if dtype is torch.bool:
        sent = None if tensor is None else tensor.to(torch.uint8)
        return broadcast_tensor(sent, shape, torch.uint8, source, device, group).to(torch.bool)
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        assert tensor is not None
        return tensor
    sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    dist.broadcast(as_bytes(sent), group_src=source, group=group)
    return sent.cpu()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as uint8: backends move bytes of any dtype, but not every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


Described = list[tuple[str, list[int], str]]
"""Name, shape and dtype of each of several tensors, as JSON."""


def describe_tensors(tensors: Mapping[str, Tensor]) -> Described:
    """Return name, shape and dtype of the tensors."""
    return [(name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()]


def broadcast_tensors(
    tensors: Mapping[str, Tensor] | None, source: int, device: torch.device, group: RankGroup = None
) -> dict[str, Tensor] | None:
    """Return the source's tensors by name, or its None, on every rank of the group, on the CPU.

    Args:
        tensors: the tensors on the source; ignored on the other ranks.
        source, device, group: as in ``broadcast_tensor``.
    """
    described = None if tensors is None else describe_tensors(tensors)
    header = cast(Described | None, broadcast_json(described, source, device, group))
    if header is None:
        return None
    is_source = not dist.is_initialized() or dist.get_rank(group) == source
    sent = tensors if is_source and tensors is not None else {}
    return {
        name: broadcast_tensor(sent.get(name), tuple(shape), getattr(torch, dtype), source, device, group)
        for name, shape, dtype in header
    }


def broadcast_json(value: object, source: int, device: torch.device, group: RankGroup = None) -> object:
    """Return the source's JSON value on every rank of the group. Other ranks' ``value`` is ignored.

    ``source``, ``device`` and ``group`` are as in ``broadcast_tensor``.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    text = _encoded(value)
    is_source = dist.get_rank(group) == source
    size = broadcast_tensor(torch.tensor([len(text)]) if is_source else None, (1,), torch.int64, source, device, group)
    sent = broadcast_tensor(text if is_source else None, (int(size),), torch.uint8, source, device, group)
    return json.loads(sent.numpy().tobytes())


def gather_json(value: object, device: torch.device, group: RankGroup = None) -> list[object]:
    """Return the JSON value of every rank of the group, in rank order, on every rank; None: all ranks.

    Two collectives: one exchanges the sizes, one the texts, padded to the longest.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    everyone = dist.group.WORLD if group is None else group
    text = _encoded(value)
    sizes = gather_over(everyone, torch.tensor([len(text)], device=device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = text.to(device)
    texts = gather_over(everyone, padded).cpu().numpy()
    return [json.loads(texts[rank, :size].tobytes()) for rank, size in enumerate(sizes)]


def _encoded(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
