"""Which collectives this rank has entered: the newest few, so that a hang can be explained.

``keep_ledger()`` puts a recorder in front of the functions of ``torch.distributed`` that everybody calls, megatron-core
included; call it before megatron is imported, which keeps some of them by value. Each call costs about a microsecond.
Point-to-point messages are seen where they are sent in batches, as megatron's pipeline does.
"""

import functools
import sys
import time
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

KEPT = 64
"""Newest entries that a ledger keeps."""


@dataclass
class Entry:
    """One call of a collective.

    Attributes:
        operation: name of the function.
        group: name of the process group, the same on all its ranks.
        ranks: who takes part.
        number: how many collectives of this group this rank has entered, this one included.
        size_bytes: of the tensors handed in.
        source: file and line of the caller.
        entered_seconds: by this machine's monotonic clock.
        left: whether the call has returned; on a GPU that says nothing about the work.
    """

    operation: str
    group: str
    ranks: Sequence[int]
    number: int
    size_bytes: int
    source: str
    entered_seconds: float
    left: bool = False

    def words(self) -> str:
        """Return the entry for people."""
        where = ",".join(map(str, self.ranks))
        return f"{self.operation} number {self.number} of ranks [{where}], {self.size_bytes} bytes, at {self.source}"


class Ledger:
    """The collectives of one process."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=KEPT)
        self.progress = 0
        """Grows whenever a collective is entered or left."""
        self._counts: Counter[str] = Counter()

    def enter(self, operation: str, group: dist.ProcessGroup | None, size_bytes: int, source: str) -> Entry:
        """Note that a collective begins."""
        group = group or dist.group.WORLD
        name = group.group_name if group is not None else "?"
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        self._counts[name] += 1
        entry = Entry(operation, name, ranks, self._counts[name], size_bytes, source, time.monotonic())
        self.entries.append(entry)
        self.progress += 1
        return entry

    def leave(self, entry: Entry) -> None:
        """Note that the call has returned."""
        entry.left = True
        self.progress += 1

    def newest(self) -> dict[str, Entry]:
        """Return the newest entry of each group."""
        return {entry.group: entry for entry in tuple(self.entries)}

    def waiting(self) -> Entry | None:
        """Return the collective that this rank is in."""
        return next((entry for entry in reversed(tuple(self.entries)) if not entry.left), None)

    def as_json(self) -> list[Mapping[str, object]]:
        """Return the entries, oldest first."""
        return [asdict(entry) for entry in tuple(self.entries)]


@functools.cache
def keep_ledger() -> Ledger:
    """Begin to record, once in a process; return the ledger."""
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
    """Return file and line of a call, the path from the package on."""
    parts = frame.f_code.co_filename.split("/")
    package = next((i for i, part in enumerate(parts) if part in ("megatron", "megatron_rl", "torch")), len(parts) - 1)
    return f"{'/'.join(parts[package:])}:{frame.f_lineno}"
