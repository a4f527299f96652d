"""A torch.distributed group of a sender and the ranks of one server, outside of torch's default process group.

Store names and prefixes are those of torch's ``new_group`` over a TCP rendezvous, so any program that joins with the
arguments of ``init_process_group``, such as SGLang, can be the other side. Nothing is registered in this process's
world, and a group that fails does not affect others.
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


class _ProcessGroup(Protocol):
    """The part of torch's process groups that is used here; torch's stubs leave it out."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work:
        """Start to send or to receive."""
        ...


class WeightGroup:
    """One side of the group: rank 0 sends, the others receive."""

    def __init__(self, group: _ProcessGroup, store: dist.Store) -> None:
        self._group, self._store = group, store

    @classmethod
    def open(cls, rendezvous: "Rendezvous", name: str, rank: int, size: int, backend: Backend) -> "WeightGroup":
        """Join the group; return when all ranks have joined.

        Raises:
            RuntimeError: some ranks did not join within the rendezvous's timeout.
        """
        device = "cuda" if backend == "nccl" else "cpu"
        prefixed = dist.PrefixStore(
            f"{device}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, rendezvous.store))
        )
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = rendezvous.timeout
            return cls(cast(_ProcessGroup, dist.ProcessGroupNCCL(prefixed, rank, size, options)), rendezvous.store)
        gloo = getattr(dist.ProcessGroupGloo, "_Options")()  # noqa: B009 (torch's stubs leave it out)
        gloo._timeout = rendezvous.timeout
        # Listen only on the interface that reaches the other side.
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=local_address(rendezvous.host))]
        return cls(cast(_ProcessGroup, dist.ProcessGroupGloo(prefixed, rank, size, gloo)), rendezvous.store)

    def broadcast(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Start to broadcast the tensors from rank 0, one after the other, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return [self._group.broadcast([_sendable(tensor)], options) for tensor in tensors]

    def close(self) -> None:
        """Leave the group without waiting; pending operations fail on both sides, at once or at their timeout."""
        # Only the destructor closes connections, and it waits for pending operations.
        parts = [self._group, self._store]
        del self._group, self._store
        threading.Thread(target=parts.clear, name="weights group", daemon=True).start()


def _sendable(tensor: Tensor) -> Tensor:
    """Return a view of a type that every backend sends: one-byte floats, which gloo does not know, as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


@dataclass(frozen=True)
class Rendezvous:
    """The store through which the ranks of a group find each other, and the timeout for joining and for each tensor."""

    store: dist.TCPStore
    host: str
    port: int
    timeout: timedelta

    @classmethod
    def listen(cls, peer: str, timeout_seconds: float) -> "Rendezvous":
        """Open a store on a free port of the local address from which ``peer`` is reached."""
        timeout = timedelta(seconds=timeout_seconds)
        with socket.socket() as listener:
            listener.bind((local_address(peer), 0))
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
    def connect(cls, host: str, port: int, timeout_seconds: float) -> "Rendezvous":
        """Connect to the store of the other side.

        Raises:
            RuntimeError: nothing listens there.
        """
        timeout = timedelta(seconds=timeout_seconds)
        return cls(dist.TCPStore(host_name=host, port=port, is_master=False, timeout=timeout), host, port, timeout)


def local_address(peer: str) -> str:
    """Return this machine's address on the route to the peer; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


def run_in_thread(function: Callable[[], T], done: Callable[[T | BaseException], None]) -> None:
    """Run a function that may hang in a daemon thread; ``done`` receives its result or its exception."""

    def run() -> None:
        try:
            result: T | BaseException = function()
        except RuntimeError as error:  # torch.distributed has no more specific type
            result = error
        done(result)

    threading.Thread(target=run, name="weights group", daemon=True).start()


def empty_tensor(shape: Sequence[int], dtype: str, device: torch.device) -> Tensor:
    """Return an uninitialized tensor of the named type."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=device)
