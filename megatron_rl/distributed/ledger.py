"""Records the most recent collectives of this rank, so that a hang can be diagnosed.

``record_collectives()`` wraps the functions of ``torch.distributed``. Call it before megatron-core is imported, because
megatron-core copies references to some of them. The overhead is about one microsecond per call. Point-to-point messages
are recorded if they are sent in batches, as megatron-core's pipeline does.
"""

import functools
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

RECORDED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "scatter",
    "scatter_object_list",
)

MAX_CALLS = 64
"""Number of recent calls that a ledger keeps."""


@dataclass
class CollectiveCall:
    """One call of a collective.

    Attributes:
        operation: name of the function.
        group: name of the process group, equal on all of its ranks.
        ranks: global ranks of the group.
        number: how many collectives of this group this rank has entered, including this one.
        size_bytes: total size of the tensor arguments.
        source: file and line of the caller.
        left: whether the call has returned. On a GPU, the collective may still be running.
    """

    operation: str
    group: str
    ranks: Sequence[int]
    number: int
    size_bytes: int
    source: str
    left: bool = False

    def describe(self) -> str:
        """Return a description for the hang report."""
        ranks = ",".join(map(str, self.ranks))
        return f"{self.operation} number {self.number} of ranks [{ranks}], {self.size_bytes} bytes, at {self.source}"


class Ledger:
    """The recent collectives of one process."""

    def __init__(self) -> None:
        self.entries: deque[CollectiveCall] = deque(maxlen=MAX_CALLS)
        self.progress = 0
        """Incremented whenever a collective is entered or left."""
        self._counts: Counter[str] = Counter()

    def enter(self, operation: str, group: dist.ProcessGroup | None, size_bytes: int, source: str) -> CollectiveCall:
        """Record the start of a collective."""
        group = group or dist.group.WORLD
        name = group.group_name if group is not None else "?"
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        self._counts[name] += 1
        entry = CollectiveCall(operation, name, ranks, self._counts[name], size_bytes, source)
        self.entries.append(entry)
        self.progress += 1
        return entry

    def leave(self, entry: CollectiveCall) -> None:
        """Record that the call has returned."""
        entry.left = True
        self.progress += 1

    def waiting(self) -> CollectiveCall | None:
        """Return the collective that this rank is waiting in; None if there is none."""
        return next((entry for entry in reversed(tuple(self.entries)) if not entry.left), None)

    def as_json(self) -> list[Mapping[str, object]]:
        """Return the calls as JSON objects, oldest first."""
        return [asdict(entry) for entry in tuple(self.entries)]


@functools.cache
def record_collectives() -> Ledger:
    """Start recording, at most once per process; return the ledger."""
    ledger = Ledger()
    for name in RECORDED:
        if hasattr(dist, name):
            setattr(dist, name, _recorded(ledger, name, getattr(dist, name)))
    return ledger


def _recorded(ledger: Ledger, name: str, function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        group = next((value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)), None)
        if not dist.is_initialized() or group == dist.GroupMember.NON_GROUP_MEMBER:
            return function(*args, **kwargs)
        size_bytes = sum(tensor.nbytes for tensor in _tensors((*args, *kwargs.values())))
        entry = ledger.enter(name, group or _group_of_messages(args), size_bytes, _caller(sys._getframe(1)))
        try:
            return function(*args, **kwargs)
        finally:
            ledger.leave(entry)

    return call


def _group_of_messages(args: tuple[object, ...]) -> dist.ProcessGroup | None:
    """Return the group of a batch of point-to-point messages."""
    first = args[0][0] if args and isinstance(args[0], list) and args[0] else None
    return first.group if isinstance(first, dist.P2POp) else None


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dist.P2POp):
            yield value.tensor
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _tensors(value)


def _caller(frame: FrameType) -> str:
    """Return file and line of a call, with the path relative to the package."""
    parts = frame.f_code.co_filename.split("/")
    package = next((i for i, part in enumerate(parts) if part in ("megatron", "megatron_rl", "torch")), len(parts) - 1)
    return f"{'/'.join(parts[package:])}:{frame.f_lineno}"
