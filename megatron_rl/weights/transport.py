"""The interface of weight transports: how new weights reach servers, and what a transport needs of a server.

    begin (all servers) -> bucket, bucket, ... (all servers in parallel)
    -> finish: apply the weights, compare checksums, set the version

A server that fails leaves the update and is reported; the others continue. This module does not know HTTP: the fleet
passes its clients in.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.weights.checksum import SHA256, SHORT_SHA256, SHORT_SHA256_DIGITS, padded_sha256
from megatron_rl.weights.flat_bucket import FlatBucket, TensorHeader
from megatron_rl.weights.shared_memory import Handle, MemoryLocation, TensorSlice

NamedTensors = Sequence[tuple[str, Tensor]]
Checksums = dict[str, tuple[str, str]]
"""Tensor name -> its checksum, and its checksum with the rows of zeros that SGLang may append."""


@dataclass(frozen=True)
class WeightReceiver:
    """How a server receives weights."""

    url: str
    ranks: int
    """Number of ranks that share the server's model."""
    is_streamed: bool
    """Whether it receives streams, passes them on to other servers, and applies no tensor before the update ends."""


@dataclass(frozen=True)
class StreamResult:
    """What became of a streamed bucket on one server."""

    error: RolloutError | None = None
    """Why the server does not have it; None if it has it, or if it is not known to have failed."""
    is_missed: bool = False
    """Whether the bucket did not get that far."""


class WeightServer(Protocol):
    """The calls that transports make to a server; ``fleet.client.Client`` implements them.

    Every call raises RolloutError if it fails.
    """

    url: str

    async def begin_update(self) -> None:
        """Open a weight update."""

    async def update_from_tensor(self, payload: str) -> None:
        """Send one bucket as a base64 pickle."""

    async def tensor_parallel(self) -> int:
        """Return the number of ranks that share the server's model."""
        ...

    async def join_group(self, host: str, port: int, size: int, name: str, backend: str, rank: int = 1) -> None:
        """Make the server join a group of ``size`` ranks as ranks ``rank`` and up; the sender is rank 0."""

    async def update_from_distributed(
        self, tensors: Sequence[TensorHeader], group: str, *, is_flat: bool = False
    ) -> None:
        """Make the server receive one bucket, broadcast in the group in this order, or as one array of bytes."""

    async def receiver(self) -> WeightReceiver:
        """Return how the server receives weights."""
        ...

    async def version(self) -> str:
        """Return the version of the server's weights."""
        ...

    async def update_from_stream(self, bucket: FlatBucket, chain: Sequence[str]) -> Mapping[str, StreamResult]:
        """Stream a bucket to the server, which passes it on to the next server of the chain while it receives.

        Returns:
            The result of this server and of each of the chain, by url.
        """
        ...

    async def leave_group(self, name: str) -> None:
        """Make the server leave the group."""

    async def memory_location(self) -> MemoryLocation | None:
        """Return where the server runs; None if it does not receive weights through shared memory."""
        ...

    async def update_from_handle(self, handle: Handle, slices: Sequence[TensorSlice]) -> None:
        """Make the server copy slices of tensors from a shared buffer; returns when they are copied."""

    async def end_update(self) -> None:
        """Close the weight update and apply the new weights."""

    async def update_from_disk(self, folder: str) -> None:
        """Make the server load its weights from a folder."""

    async def set_version(self, version: str) -> None:
        """Set the version of the server's weights."""

    async def checksums(self, algorithm: str) -> tuple[str, Mapping[str, str]]:
        """Return the algorithm (the requested one if the server knows it) and the checksum of each tensor."""


@dataclass(frozen=True)
class UpdateReport:
    """The result of a weight update."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    failed: Mapping[str, RolloutError]
    """Server url -> why the server does not have the weights; empty if all servers have them."""


@dataclass
class WeightUpdate(ABC):
    """One update in progress: ``send`` the buckets in order, then ``finish``."""

    servers: list[WeightServer]
    """The servers that have not failed."""
    version: int
    failed: dict[str, RolloutError] = field(default_factory=dict)
    sums: Checksums = field(default_factory=dict)
    """Checksums of the tensors sent so far."""
    num_bytes: int = 0
    start_seconds: float = field(default_factory=time.perf_counter)
    algorithm: ClassVar[str] = SHA256
    """Checksum algorithm of this sender."""

    async def send(self, bucket: NamedTensors) -> None:
        """Send one bucket of tensors, under checkpoint names, to every server; may empty a list."""
        self.sums |= await asyncio.to_thread(self._checksums, bucket)
        self.num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        await self._send(bucket)

    async def finish(self) -> UpdateReport:
        """Apply the new weights, compare checksums, and set the version."""
        await self._apply()
        await self._verify()
        await self.for_each_server(lambda server: server.set_version(str(self.version)))
        seconds = time.perf_counter() - self.start_seconds
        return UpdateReport(self.version, len(self.sums), self.num_bytes, seconds, dict(self.failed))

    @abstractmethod
    async def _send(self, bucket: NamedTensors) -> None: ...

    @abstractmethod
    async def _apply(self) -> None: ...

    async def for_each_server(self, action: Callable[[WeightServer], Awaitable[None]]) -> None:
        """Run the action on all remaining servers in parallel; servers that fail leave the update."""
        errors = await asyncio.gather(*(_error_of(action(server)) for server in self.servers))
        self.failed |= {s.url: error for s, error in zip(self.servers, errors, strict=True) if error}
        self.servers = [s for s, error in zip(self.servers, errors, strict=True) if not error]

    def _checksums(self, bucket: NamedTensors) -> Checksums:
        return bucket_checksums(bucket)

    def _expected(self, name: str, algorithm: str) -> Sequence[str]:
        if algorithm == self.algorithm:
            return self.sums[name][:1]
        return [value[:SHORT_SHA256_DIGITS] for value in self.sums[name]]

    async def _verify(self) -> None:
        """Compare each server's checksums with the sender's, or with the other servers' if the algorithm is unknown."""
        unknown: dict[str, Mapping[str, str]] = {}

        async def compare(server: WeightServer) -> None:
            algorithm, sums = await server.checksums(self.algorithm)
            if algorithm not in (self.algorithm, SHORT_SHA256):
                unknown[server.url] = sums
                return
            names = self.sums.keys() if algorithm == self.algorithm else self.sums.keys() & sums.keys()
            wrong = [n for n in self.sums if n in names and sums.get(n) not in self._expected(n, algorithm)]
            if not names:
                raise RolloutError(f"{server.url}: it has none of the {len(self.sums)} tensors that were sent, by name")
            if wrong:
                raise RolloutError(
                    f"{server.url}: {len(wrong)} of {len(names)} tensors differ from what was sent, first "
                    f"{wrong[0]!r}; if it serves another dtype than the trainer's, start it with the same one"
                )

        await self.for_each_server(compare)
        reference = next(iter(unknown.values()), None)
        for url, sums in unknown.items():
            if sums != reference:
                self.failed[url] = RolloutError(f"{url}: its checksums differ from those of {next(iter(unknown))}")
        self.servers = [server for server in self.servers if server.url not in self.failed]


async def _error_of(call: Awaitable[None]) -> RolloutError | None:
    try:
        await call
    except RolloutError as error:
        return error
    return None


class WeightTransport(ABC):
    """A way to bring weights to servers."""

    bucket_bytes: int
    in_flight: int = 1
    """Maximum number of buckets that are gathered or sent at a time; each is sent before the next is gathered if 1."""
    dtype: torch.dtype | None = None
    """Type in which floating-point tensors are sent; None sends each in its type."""

    @abstractmethod
    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update of these servers."""

    def open(self) -> None:
        """Run in the trainer's thread after ``begin``; collective if every rank sends its tensors."""
        return

    def join(self, update: WeightUpdate) -> None:
        """Run in the trainer's thread after the last bucket; collective if every rank sends its tensors."""
        return

    async def resend(self, servers: Sequence[WeightServer], version: int) -> UpdateReport | None:
        """Bring the newest version to more servers; None if its tensors would have to be sent again."""
        return None

    async def close(self) -> None:
        """Give up what is kept from push to push."""
        return

    async def push(
        self, servers: Sequence[WeightServer], named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> UpdateReport:
        """Run a whole update."""
        update = await self.begin(servers, version)
        self.open()
        for bucket in self.buckets(named_tensors):
            await update.send(bucket)
            bucket.clear()
        self.join(update)
        return await update.finish()

    def buckets(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the tensors as lists of at most ``bucket_bytes`` bytes; a larger tensor gets a list of its own."""
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in named_tensors:
            if bucket and size + tensor.nbytes > self.bucket_bytes:
                yield bucket
                bucket = []
                size = 0
            bucket.append((name, self._converted(tensor)))
            size += bucket[-1][1].nbytes
            del tensor  # free it before the next one is made
            if size >= self.bucket_bytes:
                yield bucket
                bucket = []
                size = 0
        if bucket:
            yield bucket

    def _converted(self, tensor: Tensor) -> Tensor:
        return converted(tensor, self.dtype).cpu()


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous tensor, of this type if it is a floating-point one."""
    return tensor.detach().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).contiguous()


Bucket = list[tuple[str, Tensor]]
SendBucket = Callable[[Bucket], Coroutine[object, object, None]]


def bucket_sender(update: WeightUpdate, copy: list[NamedTensors] | None) -> SendBucket:
    """Return a function that sends a bucket of the update and empties it; ``copy`` gets a copy of the tensors first."""

    async def send(bucket: Bucket) -> None:
        if copy is not None:
            copy.append([(name, tensor.clone()) for name, tensor in bucket])
        await update.send(bucket)
        bucket.clear()

    return send


def send_buckets(
    start: Callable[[Coroutine[object, object, None]], "Future[None]"],
    send: SendBucket,
    buckets: Iterable[Bucket],
    in_flight: int,
) -> None:
    """Send buckets in another thread's event loop, while the next ones are gathered in this thread.

    Args:
        start: starts a coroutine in the event loop.
        send: sends a bucket and empties it.
        buckets: the buckets; may use collectives.
        in_flight: see ``WeightTransport.in_flight``.
    """
    pending: deque[Future[None]] = deque()
    try:
        for bucket in buckets:
            pending.append(start(send(bucket)))
            while len(pending) >= in_flight:
                pending.popleft().result()
        while pending:
            pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def bucket_checksums(bucket: NamedTensors) -> Checksums:
    """Return the checksums of each tensor of a bucket."""
    return {name: padded_sha256(tensor) for name, tensor in bucket}
