"""How new weights reach servers: what a carrier does, and what it needs of a server.

    begin (awaited on all) -> bucket, bucket, ... (to all servers at once) -> end -> checksums compared -> version named

A server that fails on the way leaves the push and is reported; the others go on. Nothing here knows HTTP: the fleet
passes its clients in.
"""

import asyncio
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.shared_memory import Handle, Place, TensorPiece

NamedTensors = Sequence[tuple[str, Tensor]]
CHECKSUM = "sha256"
"""Of a tensor's bytes, row-major and little-endian; what the embedded server computes too."""
SHORT_CHECKSUM = "sha256/8"
"""The first 8 bytes of the same: SGLang on a CPU. It fuses some tensors, which then have names that the sender has not,
and pads others with rows of zeros."""
_PAD_ROWS = 64
"""SGLang's tables of the vocabulary have a multiple of this many rows."""
_SHORT_DIGITS = 16


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a tensor before it comes."""

    name: str
    dtype: str
    """As torch names it, such as ``bfloat16``."""
    shape: tuple[int, ...]


class Server(Protocol):
    """What a carrier asks of a server. Every call raises RolloutError when it fails."""

    url: str

    async def begin_update(self) -> None:
        """Open an update."""

    async def update_from_tensor(self, payload: str) -> None:
        """Take a bucket."""

    async def tensor_parallel(self) -> int:
        """Return the ranks that share its model."""
        ...

    async def join_group(self, host: str, port: int, size: int, name: str, backend: str) -> None:
        """Join a group of ``size`` ranks, of which the sender is rank 0 and has its store there."""

    async def update_from_distributed(self, tensors: Sequence["TensorHeader"], group: str) -> None:
        """Take a bucket that is broadcast in the group, in this order."""

    async def leave_group(self, name: str) -> None:
        """Leave the group."""

    async def place(self) -> Place | None:
        """Return where it runs; None if it takes no weights through shared memory."""
        ...

    async def update_from_handle(self, handle: Handle, pieces: Sequence[TensorPiece]) -> None:
        """Copy these pieces out of a shared buffer; returns when it has."""

    async def end_update(self) -> None:
        """Use the new weights."""

    async def update_from_disk(self, folder: str) -> None:
        """Read the weights from a folder."""

    async def set_version(self, version: str) -> None:
        """Name the weights."""

    async def checksums(self, algorithm: str) -> tuple[str, Mapping[str, str]]:
        """Return the algorithm, the one asked for if the server knows it, and the checksum of each tensor."""


@dataclass(frozen=True)
class UpdateReport:
    """What a push did."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    failed: Mapping[str, RolloutError]
    """Server url -> why it does not have the weights. Empty: all have them."""


@dataclass
class WeightUpdate(ABC):
    """One push under way. ``send`` the buckets in order, then ``finish``."""

    servers: list[Server]
    """Those that have not failed."""
    version: int
    failed: dict[str, RolloutError] = field(default_factory=dict)
    sums: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Checksums of every tensor, as sent and padded."""
    num_bytes: int = 0
    begun: float = field(default_factory=time.perf_counter)
    algorithm: ClassVar[str] = CHECKSUM
    """Of the checksums that this sender computes."""

    async def send(self, bucket: NamedTensors) -> None:
        """Send one bucket of tensors in checkpoint names to every server."""
        self.sums |= await asyncio.to_thread(self._sums, bucket)
        self.num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        await self._carry(bucket)

    async def finish(self) -> UpdateReport:
        """Put the new weights to use, compare checksums, name the version."""
        await self._end()
        await self._verify()
        await self.each(lambda server: server.set_version(str(self.version)))
        seconds = time.perf_counter() - self.begun
        return UpdateReport(self.version, len(self.sums), self.num_bytes, seconds, dict(self.failed))

    @abstractmethod
    async def _carry(self, bucket: NamedTensors) -> None: ...

    @abstractmethod
    async def _end(self) -> None: ...

    async def each(self, action: Callable[[Server], Awaitable[None]]) -> None:
        """Do something on all remaining servers at once; those that fail leave the push."""
        outcomes = await asyncio.gather(*(_outcome(action(server)) for server in self.servers))
        self.failed |= {s.url: why for s, why in zip(self.servers, outcomes, strict=True) if why}
        self.servers = [s for s, why in zip(self.servers, outcomes, strict=True) if not why]

    def _sums(self, bucket: NamedTensors) -> dict[str, tuple[str, str]]:
        return sums_of(bucket)

    def _allowed(self, name: str, algorithm: str) -> Sequence[str]:
        whole = algorithm == self.algorithm
        return self.sums[name][:1] if whole else [value[:_SHORT_DIGITS] for value in self.sums[name]]

    async def _verify(self) -> None:
        """Compare every server's checksums with the sender's, or among each other if they are of another kind."""
        found: dict[str, Mapping[str, str]] = {}

        async def compare(server: Server) -> None:
            algorithm, sums = await server.checksums(self.algorithm)
            if algorithm not in (self.algorithm, SHORT_CHECKSUM):
                found[server.url] = sums
                return
            names = self.sums.keys() if algorithm == self.algorithm else self.sums.keys() & sums.keys()
            wrong = [n for n in self.sums if n in names and sums.get(n) not in self._allowed(n, algorithm)]
            if not names:
                raise RolloutError(f"{server.url}: it has none of the {len(self.sums)} tensors that were sent, by name")
            if wrong:
                raise RolloutError(
                    f"{server.url}: {len(wrong)} of {len(names)} tensors differ from what was sent, first "
                    f"{wrong[0]!r}; if it serves another dtype than the trainer's, start it with the same one"
                )

        await self.each(compare)
        reference = next(iter(found.values()), None)
        for url, sums in found.items():
            if sums != reference:
                self.failed[url] = RolloutError(f"{url}: its checksums differ from those of {next(iter(found))}")
        self.servers = [server for server in self.servers if server.url not in self.failed]


async def _outcome(call: Awaitable[None]) -> RolloutError | None:
    try:
        await call
    except RolloutError as error:
        return error
    return None


class WeightTransport(ABC):
    """A way for weights to reach servers."""

    bucket_bytes: int
    dtype: torch.dtype | None = None
    """Type that floating-point tensors are sent in; None: their own."""

    @abstractmethod
    async def begin(self, servers: Sequence[Server], version: int) -> WeightUpdate:
        """Open a push to these servers."""

    def open(self) -> None:
        """Called in the trainer's thread when a push has begun; collective where ranks bring tensors of their own."""
        return

    def join(self, push: WeightUpdate) -> None:
        """Called in the trainer's thread after the last bucket; collective where ranks bring tensors of their own."""
        return

    async def repeat(self, servers: Sequence[Server], version: int) -> UpdateReport | None:
        """Give servers the newest version once more; None: it would have to be sent again."""
        return None

    async def push(
        self, servers: Sequence[Server], named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> UpdateReport:
        """Send all tensors; return what happened."""
        push = await self.begin(servers, version)
        for bucket in self.buckets(named_tensors):
            await push.send(bucket)
            bucket.clear()
        return await push.finish()

    def buckets(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the tensors on the CPU, in lists of at most ``bucket_bytes``; a larger tensor has its own."""
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in named_tensors:
            if bucket and size + tensor.nbytes > self.bucket_bytes:
                yield bucket
                bucket = []
                size = 0
            bucket.append((name, self._sent(tensor)))
            size += bucket[-1][1].nbytes
            del tensor  # before the next one comes
            if size >= self.bucket_bytes:
                yield bucket
                bucket = []
                size = 0
        if bucket:
            yield bucket

    def _sent(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype).contiguous()


def sums_of(bucket: NamedTensors) -> dict[str, tuple[str, str]]:
    """Return the checksums of each tensor."""
    return {name: checksums(tensor) for name, tensor in bucket}


def checksum(tensor: Tensor) -> str:
    """Return the sha256 of the tensor's bytes."""
    return checksums(tensor)[0]


def checksums(tensor: Tensor) -> tuple[str, str]:
    """Return the sha256 of the tensor's bytes, and with as many rows of zeros as SGLang may pad it with."""
    digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data)
    padded = digest.copy()
    if tensor.dim() == 2:
        padded.update(bytes(-len(tensor) % _PAD_ROWS * tensor[0].nbytes))
    return digest.hexdigest(), padded.hexdigest()
