"""Records the most recent collectives of this rank, so that a hang can be diagnosed.

``record_collectives()`` wraps the functions of ``torch.distributed``. Call it before megatron-core is imported, because
megatron-core copies references to some of them. The overhead is about one microsecond per call, on a GPU a few.

A call that returns is not a collective that has finished: NCCL returns when the work is enqueued. A recorded call keeps
its work object (``is_completed``); a call that returns none keeps an event on the stream that waits for it. ``poll``
asks them. Point-to-point messages are recorded if they are sent by ``send`` and ``recv``, or in batches, as
megatron-core's pipeline does; ``isend`` and ``irecv`` are not, because ``P2POp`` compares them with the originals.
"""

import functools
import sys
import weakref
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
IsCompleted = Callable[[], bool]

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
    "recv",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "scatter",
    "scatter_object_list",
    "send",
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
        left: whether the collective has finished: the call has returned, and its work is completed.
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
        self._works: dict[int, tuple[CollectiveCall, Sequence[IsCompleted]]] = {}

    def enter(
        self,
        operation: str,
        group: dist.ProcessGroup | None,
        size_bytes: int,
        source: str,
        pair: tuple[int, int] | None = None,
    ) -> CollectiveCall:
        """Record the start of a collective, or of a message if ``pair`` has the ranks of sender and receiver."""
        group = group or dist.group.WORLD
        name = group.group_name if group is not None else "?"
        ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
        if pair is not None:  # both ends count the messages of their direction
            name, ranks = f"{name}: {pair[0]} to {pair[1]}", pair
        self._counts[name] += 1
        entry = CollectiveCall(operation, name, ranks, self._counts[name], size_bytes, source)
        self.entries.append(entry)
        self.progress += 1
        return entry

    def leave(self, entry: CollectiveCall, works: Sequence[IsCompleted] = ()) -> None:
        """Record that the call has returned, and what tells whether its work is completed."""
        self.progress += 1
        entry.left = not works
        if works:
            self._works[id(entry)] = (entry, works)
            while len(self._works) > MAX_CALLS:
                self._works.pop(next(iter(self._works)))

    def poll(self) -> None:
        """Find out which works have been completed since the last call. Called by the watchdog's thread."""
        for key, (entry, works) in tuple(self._works.items()):
            if all(is_completed() for is_completed in works):
                entry.left = True
                self.progress += 1
                self._works.pop(key, None)

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
        group = group or _group_of_messages(args)
        pair = _pair(name, group, args, kwargs) if name in ("send", "recv") else None
        entry = ledger.enter(name, group, size_bytes, _caller(sys._getframe(1)), pair)
        result: object = None
        try:
            result = function(*args, **kwargs)
            return result
        finally:
            ledger.leave(entry, _works(result))

    return call


def _works(result: object) -> list[IsCompleted]:
    """Return what tells whether the work of a call that returned ``result`` is completed; empty if it is.

    Work objects are held weakly, because they hold tensors: one that the caller has dropped counts as completed, and
    the next call without a work object finds out: on a GPU, it makes the current stream wait for the collective.
    """
    if isinstance(result, dist.Work):
        return [] if result.is_completed() else [functools.partial(_is_completed, weakref.ref(result))]
    if isinstance(result, list):
        return [work for each in result for work in _works(each)]
    if on_stream():
        event = torch.cuda.Event()
        event.record()
        return [event.query]
    return []


def _is_completed(reference: "weakref.ref[dist.Work]") -> bool:
    work = reference()
    return work is None or work.is_completed()


def on_stream() -> bool:
    """Return whether collectives run on a stream of a GPU, after the call has returned."""
    return torch.cuda.is_initialized() and dist.get_backend() == "nccl"


def _pair(
    name: str, group: dist.ProcessGroup | None, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[int, int] | None:
    """Return the ranks of sender and receiver of a message; None if any rank may send it."""
    end = "dst" if name == "send" else "src"
    peer = kwargs.get(end, args[1] if len(args) > 1 else None)
    in_group = kwargs.get(f"group_{end}")
    if isinstance(in_group, int) and group is not None:
        peer = dist.get_global_rank(group, in_group)
    if not isinstance(peer, int):
        return None
    return (dist.get_rank(), peer) if name == "send" else (peer, dist.get_rank())


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
