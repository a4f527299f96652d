"""A process group of its own for two parties that are no ranks of each other's world: a sender and one server.

The names and prefixes of the store are torch's for ``new_group`` over a TCP rendezvous, so that the other side may be
any program that joins with ``init_process_group``'s arguments, such as SGLang. Nothing is registered in this process's
world, and a group that fails takes no other with it.
"""

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Backend = Literal["gloo", "nccl"]


class _Group(Protocol):
    """What is used of torch's process groups, whose stubs leave it out."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work:
        """Begin to send or to receive."""
        ...


class Pair:
    """One side of the group: rank 0 sends, the others receive."""

    def __init__(self, group: _Group, store: dist.Store) -> None:
        self._group, self._store = group, store

    @classmethod
    def open(cls, store: "Meeting", name: str, rank: int, size: int, backend: Backend) -> "Pair":
        """Join and return when all have joined.

        Raises:
            RuntimeError: they have not within the meeting's timeout.
        """
        device = "cuda" if backend == "nccl" else "cpu"
        prefixed = dist.PrefixStore(f"{device}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store.store)))
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = store.timeout
            return cls(cast(_Group, dist.ProcessGroupNCCL(prefixed, rank, size, options)), store.store)
        gloo = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 (torch's stubs leave it out)
        gloo._timeout = store.timeout
        # An address on the way to the other side: no other interface is listened on.
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(store.host))]
        return cls(cast(_Group, dist.ProcessGroupGloo(prefixed, rank, size, gloo)), store.store)

    def broadcast(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to send the tensors from rank 0 to the others, one after the other, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return [self._group.broadcast([tensor], options) for tensor in tensors]

    def close(self) -> None:
        """Leave: what is under way fails on either side, at once or when its time is up. Waits for nothing."""
        # Only the end of the object closes connections, and it waits for what is under way.
        parts = [self._group, self._store]
        del self._group, self._store
        threading.Thread(target=parts.clear, name="weights group", daemon=True).start()


@dataclass(frozen=True)
class Meeting:
    """Where the parties of a group find each other, and how long each waits for the others and for a tensor."""

    store: dist.TCPStore
    host: str
    port: int
    timeout: timedelta

    @classmethod
    def listening(cls, towards: str, timeout_seconds: float) -> "Meeting":
        """Return one on a free port of the address from which ``towards`` is reached."""
        timeout = timedelta(seconds=timeout_seconds)
        with socket.socket() as listener:
            listener.bind((address_towards(towards), 0))
            listener.listen()
            host, port = listener.getsockname()
            store = dist.TCPStore(
                host_name=host,
                port=port,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        return cls(store, host, port, timeout)

    @classmethod
    def at(cls, host: str, port: int, timeout_seconds: float) -> "Meeting":
        """Return the one that the other side listens with.

        Raises:
            RuntimeError: it does not.
        """
        timeout = timedelta(seconds=timeout_seconds)
        return cls(dist.TCPStore(host_name=host, port=port, is_master=False, timeout=timeout), host, port, timeout)


def address_towards(host: str) -> str:
    """Return this machine's address on the way to the host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def in_thread(function: Callable[[], T], done: Callable[[T | BaseException], None]) -> None:
    """Run something that may hang in a thread that no one waits for; ``done`` gets what it returns or raises."""

    def run() -> None:
        try:
            result: T | BaseException = function()
        except RuntimeError as error:  # of torch.distributed, which says nothing more precise
            result = error
        done(result)

    threading.Thread(target=run, name="weights group", daemon=True).start()


def empty(shape: Sequence[int], dtype: str, device: torch.device) -> Tensor:
    """Return room for a tensor that will come."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
