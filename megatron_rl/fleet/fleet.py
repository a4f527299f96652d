"""N servers as one: prompts in, groups out, new weights to all; a server more or less changes nothing but the time.

    trainer rank 0 --submit(prompts)----> plan: fixed chunks --> least loaded ready server --> checked --> groups
                   --update(weights)----> carrier: bucket by bucket to every ready server --> checksums --> version
    watch (one task a server): busy and silent, or dead -> leaves, its chunks go elsewhere
                               back -> gets the current weights -> takes chunks again

Synchronous outside, asynchronous inside: all of it runs on one event loop in a thread of its own, and every method may
be called from any other thread.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate, count
from typing import TypeVar

from torch import Tensor

from megatron_rl.config.schema import Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.affinity import Affinity
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy, watch
from megatron_rl.fleet.partial import Decode, Pieces
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import RequestRefused, Sample, SampleRequest, ServerUnreachable
from megatron_rl.fleet.request_plan import Chunk, groups, plan, sampling_params
from megatron_rl.fleet.router import Router
from megatron_rl.fleet.sync import WeightSync
from megatron_rl.fleet.turns import Turns
from megatron_rl.weights.transport import NamedTensors, UpdateReport, WeightTransport

T = TypeVar("T")


class Fleet:
    """The servers of a run. Use it as a context manager, or close it."""

    client: type[Client] = Client
    """Speaks to a server; of another kind for another engine."""

    def __init__(
        self,
        servers: Sequence[ServerProcess | str],
        transport: WeightTransport,
        patience: Timeouts | None = None,
        rows_per_request: int = 256,
        requests_per_server: float = 2,
        keep_weights: bool = True,
        *,
        decode: Decode | None = None,
    ) -> None:
        """Start the servers that are processes, and wait until all are healthy.

        Args:
            servers: processes to start and stop, or the urls of running servers.
            transport: brings weights to the servers.
            patience: timeouts and retries.
            rows_per_request: sequences in one request; whole groups, at least one.
            requests_per_server: requests that a server works on at once.
            keep_weights: keep a copy of the weights in this process for servers that come back between two pushes.
            decode: if given, a push ends the responses in the making, and the fleet asks for the rest with what they
                have as a prefix; without it the servers pause them, and go on with them under the new weights.
        """
        self.patience = patience or Timeouts()
        self.rows_per_request = rows_per_request
        self.requests_per_server = requests_per_server
        self.keep_weights = keep_weights
        self.decode = decode
        self.sync = WeightSync(transport, self.patience, "retract" if decode is None else "abort")
        self.members = [self._member(server) for server in servers]
        self.router: Router | None = None
        self.turns: Turns | None = None
        self._affinity = Affinity()
        self._changed = asyncio.Event()
        self._watches: list[asyncio.Task[None]] = []
        self._loop = LoopThread("rollout fleet")
        try:
            for member in self.members:
                if member.process is not None:
                    member.process.start()
            self._loop.call(self._open())
        except BaseException:
            self.close()
            raise

    def _member(self, server: ServerProcess | str) -> Member:
        process = None if isinstance(server, str) else server
        url = server if isinstance(server, str) else server.url
        patience = self.patience
        timeouts = patience.request_timeout_seconds, patience.control_timeout_seconds
        return Member(self.client(url, *timeouts, retries=2), process)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """The servers that take requests now."""
        return [member.url for member in self.members if member.ready]

    @property
    def busy_seconds(self) -> float:
        """How long a server has had a request to work on, so far, mean over the servers."""
        return sum(member.busy_seconds for member in self.members) / max(len(self.members), 1)

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: Sequence[int],
        weight_version: int | None = None,
        routes: RouteShape | None = None,
    ) -> list[Group]:
        """Return ``group_size`` responses to each prompt, in order.

        Args:
            prompts: what to answer.
            group_size: responses to each.
            sampling: how they are drawn.
            seed: (run seed, step), or whatever else makes this call's samples different from all others.
            weight_version: the weights that must make every token; None: any.
            routes: of the model, if the servers shall return the experts that they chose.
        """
        versions = None if weight_version is None else range(weight_version, weight_version + 1)
        pending = self.submit(prompts, group_size, sampling, seed, versions, routes=routes)
        try:
            return [group for _, chunk in pending for group in chunk.result()]
        finally:
            for _, chunk in pending:
                chunk.cancel()

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: Sequence[int],
        weight_versions: range | None = None,
        *,
        wanted: Collection[int] | None = None,
        routes: RouteShape | None = None,
    ) -> list[tuple[int, Future[list[Group]]]]:
        """Ask and do not wait: return a future for each request, after the place of the first prompt that it is for.

        ``weight_versions``: the weights that may make a token; None: any. ``wanted``: the places of the prompts that
        matter; requests without any are left out, and change nothing about the others. The rest as in ``generate``.
        """
        chunks = plan(prompts, group_size, sampling_params(sampling), seed, self.rows_per_request, routes)
        firsts = accumulate((len(chunk.prompts) for chunk in chunks), initial=0)
        return [
            (first, self._loop.start(self._groups(chunk, weight_versions)))
            for first, chunk in zip(firsts, chunks, strict=False)
            if wanted is None or not set(wanted).isdisjoint(range(first, first + len(chunk.prompts)))
        ]

    def score(self, sequences: Sequence[Sequence[int]], weight_version: int | None = None) -> list[tuple[float, ...]]:
        """Return the engine's log-probs of each sequence's tokens but the first, at temperature 1."""
        requests = [SampleRequest(f"score/{i}", tuple(ids), {"max_new_tokens": 0}) for i, ids in enumerate(sequences)]
        n = self.rows_per_request
        chunks = [requests[i : i + n] for i in range(0, len(requests), n)]
        versions = None if weight_version is None else range(weight_version, weight_version + 1)
        answers = self._loop.call(together([self._ask(chunk, versions) for chunk in chunks]))
        return [sample.input_logprobs for samples in answers for sample in samples]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateReport:
        """Give all servers these weights, named as in a checkpoint; a server that fails leaves the fleet.

        The tensors are taken from the iterable in the calling thread, bucket by bucket: it may use collectives.
        """
        copy: list[NamedTensors] = []
        try:
            transport = self.sync.transport
            update = self._loop.call(self.sync.begin(self.members, version))
            transport.open()
            for bucket in transport.buckets(named_tensors):
                self._loop.call(update.send(bucket))
                if self.keep_weights:
                    copy.append([(name, tensor.clone()) for name, tensor in bucket])
                bucket.clear()
            transport.join(update)
            return self._loop.call(self.sync.end(update, version, copy))
        finally:
            self._loop.call(self.sync.release())

    def use_router(self, router: ServerProcess | str) -> None:
        """Send plain generation through a router from now on; start it if it is a process."""
        self.router = Router(router, self.patience)
        if self.router.member.process is not None:
            self.router.member.process.start()
        self._loop.call(self._open_router(self.router))

    def close(self) -> None:
        """Stop the servers that this fleet started, and the thread; more than once does no harm."""
        if self._loop.is_open:
            self._loop.call(self._close())
            self._loop.close()
        for member in self._all_members():
            if member.process is not None:
                member.process.stop()

    def _all_members(self) -> list[Member]:
        return [*self.members, *([self.router.member] if self.router else [])]

    # What follows runs on the loop.

    async def _open(self) -> None:
        await together([wait_until_healthy(member, self.patience) for member in self.members])
        for member in self.members:
            member.version = await member.client.version()
            member.join()
            self._watches.append(
                asyncio.ensure_future(watch(member, self.patience, self.sync.catch_up, self._changed.set))
            )

    async def _open_router(self, router: Router) -> None:
        await wait_until_healthy(router.member, self.patience)
        router.member.join()
        self._watches.append(
            asyncio.ensure_future(watch(router.member, self.patience, router.caught_up, self._changed.set))
        )

    async def _close(self) -> None:
        for task in self._watches:
            task.cancel()
        for member in self._all_members():
            await member.client.close()

    async def _groups(self, chunk: Chunk, versions: range | None) -> list[Group]:
        samples = await self._ask(chunk.requests, versions)
        if self.turns is None:
            return groups(chunk, samples)
        return await self.turns.finish(chunk, samples, partial(self._ask, versions=versions))

    async def _require(self, versions: range) -> None:
        """See that every ready server has the weights of the fleet; raise if those are not among the versions."""
        await self.sync.wait_until_idle()
        wanted = self.sync.version or str(versions[0])
        if int(wanted) not in versions:
            wanted = str(versions[-1])  # which nobody has: the error says so
        await together([self._require_of(member, wanted) for member in self.members if member.ready])

    async def _require_of(self, member: Member, version: str) -> None:
        try:
            await self.sync.require(member, version)
        except ServerUnreachable as error:
            member.leave(error, self.patience)

    async def _ask(self, requests: Sequence[SampleRequest], versions: range | None) -> list[Sample]:
        """Return the samples of one chunk, from whichever server gives them first."""
        version = None if versions is None else frozenset(map(str, versions))
        errors: list[str] = []
        pieces = Pieces(requests, self.decode)
        for attempt in count():
            if len(errors) == self.patience.attempts:
                break
            if versions is not None:
                await self._require(versions)
            # A router gets one chance: what it failed at goes to a server that is chosen here.
            plain = requests[0].routes is None and requests[0].max_new_tokens > 0 and not attempt
            # A request that was given up may still run where it was: its id is not used again.
            missing = pieces.missing(f"@{attempt}" if attempt else "")
            member = await self._pick(missing, version, errors, self.router if plain else None)
            pushes = self.sync.pushes
            try:
                samples = await member.generate(missing, version)
                aborted = sum(sample.finish_reason == "abort" for sample in samples)
                if not aborted or (self.decode and self.sync.pushes > pushes):
                    if whole := pieces.add(samples):
                        return whole
                    continue
                # Not the server's fault, and not a response either. The whole request again: the same as without it.
                errors.append(f"{member.url} aborted {aborted} of {len(samples)} sequences")
            except RequestRefused:
                raise
            except RolloutError as error:
                errors.append(str(error))
                member.leave(error, self.patience)
            finally:
                self._changed.set()
        raise RolloutError(
            f"{len(requests)} sequences failed {len(errors)} times, no more is tried: " + "; ".join(errors)
        )

    async def _pick(
        self,
        requests: Sequence[SampleRequest],
        versions: Collection[str] | None,
        errors: Sequence[str],
        router: Router | None,
    ) -> Member:
        """Return the router if it may be used, else a ready server as soon as one has room; none during a push."""
        lonely_since = time.monotonic()
        while True:
            await self.sync.wait_until_idle()
            ready = [m for m in self.members if m.ready and (versions is None or m.version in versions)]
            if router is not None:
                await router.follow([member.url for member in ready])
                if router.serves(ready, self.requests_per_server):
                    return router.member
            free = [m for m in ready if len(m.requests) < self.requests_per_server]
            if free:
                return self._affinity.choose(free, requests, self.sync.pushes)
            now = time.monotonic()
            if ready:
                lonely_since = now
            elif now - lonely_since > self.patience.start_timeout_seconds:
                why = "; ".join(f"{m.url}: {m.reason or f'has weights {m.version}'}" for m in self.members)
                raise RolloutError(
                    f"no rollout server for {self.patience.start_timeout_seconds:g} s: {why}"
                    + (f"; before that: {'; '.join(errors)}" if errors else "")
                )
            await self._change()

    async def _change(self) -> None:
        """Wait until something about the members may have changed."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self.patience.probe_seconds)


async def together(coroutines: Sequence[Coroutine[object, object, T]]) -> list[T]:
    """Return the results of all; if one fails the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
