"""Several inference servers used as one; the number of servers affects the time, not the results.

    controller     --submit(prompts)----> one request per sequence --> least busy ready server --> validated --> groups
    main rank      --update(weights)----> transport: each bucket to every ready server --> checksums --> version
    monitor (one task per server): ended, or busy and silent -> leaves, its requests go to other servers
                                   healthy again -> gets the current weights -> takes requests again
    registry: a new address -> gets the current weights -> takes requests; an address is gone -> leaves for good

The interface is synchronous. Inside, everything runs on one asyncio event loop in a background thread, and every method
may be called from any other thread.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, count
from typing import TypeVar

import numpy as np
from torch import Tensor

from megatron_rl.config.rollout import Sampling
from megatron_rl.data.routes import RouteShape
from megatron_rl.data.types import Group, Prompt, Response
from megatron_rl.errors import RolloutError
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.dispatch import Dispatcher
from megatron_rl.fleet.members import Member, Timeouts, wait_until_healthy
from megatron_rl.fleet.membership import Membership
from megatron_rl.fleet.partial import Decode, PartialResults
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.protocol import GenerationRequest, GenerationResult, RequestRefused, ServerUnreachable
from megatron_rl.fleet.quantization import FormJudge
from megatron_rl.fleet.receivers import Receiver, ReceiverEnded
from megatron_rl.fleet.registry import Registry
from megatron_rl.fleet.request_plan import HttpRequest, RequestBatch, plan_requests, sampling_params
from megatron_rl.fleet.router import Router
from megatron_rl.fleet.sync import WeightSync
from megatron_rl.fleet.turns import MultiTurn
from megatron_rl.weights.transport import (
    NamedTensors,
    UpdateReport,
    WeightTransport,
    WeightUpdate,
    bucket_sender,
    send_buckets,
)

T = TypeVar("T")


@dataclass(eq=False)
class Fleet:
    """The servers of a run. ``Fleet.open`` makes one and documents its settings; close it, or use it in ``with``."""

    members: list[Member]
    sync: WeightSync
    timeouts: Timeouts
    sequences_per_request: int
    dispatcher: Dispatcher
    keep_weights: bool
    decode: Decode | None
    multi_turn: MultiTurn | None
    text_of: Callable[[Response], str] | None
    router: Router | None
    registry: Registry | None
    membership: Membership
    vocabulary: int = field(default=1 << 31, init=False)
    """Number of tokens of the trainer's model; an answer with another token is a server's failure."""
    _numbers: "count[int]" = field(default_factory=count, init=False)
    _loop: LoopThread = field(default_factory=lambda: LoopThread("rollout fleet"), init=False)

    @classmethod
    def open(
        cls,
        servers: Sequence[ServerProcess | str],
        transport: WeightTransport,
        timeouts: Timeouts | None = None,
        *,
        client: type[Client] = Client,
        sequences_per_server: int = 512,
        sequences_per_request: int = 1,
        keep_weights: bool = True,
        decode: Decode | None = None,
        multi_turn: MultiTurn | None = None,
        text_of: Callable[[Response], str] | None = None,
        router: ServerProcess | str | None = None,
        receivers: int = 0,
        registry: Registry | None = None,
        judge: FormJudge | None = None,
    ) -> "Fleet":
        """Start the servers that are processes, wait until all are healthy, and return the fleet.

        Args:
            servers: processes to start and stop, or the urls of running servers.
            transport: brings weights to the servers.
            timeouts: time limits and retries.
            client: client class of the servers' engine.
            sequences_per_server: sequences that a server works on at the same time.
            sequences_per_request: 1: every sequence is an HTTP request. Above 1, a request has at most so many
                sequences, in whole groups, at least one group, and any failure repeats it as a whole: a server whose
                results depend on the sequences that it decodes together then repeats bit for bit.
            keep_weights: whether to keep a copy of the weights here for servers that come back between two pushes.
            decode: a push aborts responses, and the rest is requested with a prefix; None: servers continue them.
            multi_turn: generates multi-turn responses; None for responses of one turn.
            text_of: returns the text of a response of one turn, if it is not the engine's text.
            router: a router process to start, or the url of a running one; plain generation goes through it.
            receivers: processes that receive the answers; 0: this one does.
            registry: the addresses of the servers, followed while the fleet is open: servers join and leave it.
            judge: refuses servers for the form of their weights; None: no server is asked.

        Raises:
            RolloutError: a server did not become healthy, or was refused for the form of its weights.
        """
        timeouts, processes = timeouts or Timeouts(), [Receiver() for _ in range(receivers)]
        sync = WeightSync(transport, timeouts, "retract" if decode is None else "abort")
        membership = Membership(sync, timeouts, client, processes, judge)
        for server in servers:
            membership.add(server)
        front = Router(router, timeouts) if router else None
        fleet = cls(
            *(membership.members, sync, timeouts, sequences_per_request),
            Dispatcher(membership.members, sync, timeouts, sequences_per_server, front),
            keep_weights=keep_weights,
            decode=decode,
            multi_turn=multi_turn,
            text_of=text_of,
            router=front,
            registry=registry,
            membership=membership,
        )
        fleet._start()
        return fleet

    def _start(self) -> None:
        try:
            for member in self._all_members():
                if member.process is not None:
                    member.process.start()
            self._loop.call(self._open())
        except BaseException:
            self.close()
            raise

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
        """Total time that a server has had unfinished requests, mean over the servers."""
        return sum(member.busy_seconds for member in self.members) / max(len(self.members), 1)

    @property
    def answers(self) -> int:
        """Requests finished and health checks answered during requests, over all servers: rises while they work."""
        return sum(member.answers for member in self.members)

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
            prompts: the prompts.
            group_size: responses per prompt.
            sampling: sampling parameters.
            seed: (run seed, step), or other numbers that distinguish this call's samples from those of all others.
            weight_version: the weights that must generate every token; None allows any.
            routes: shape of the model's routes, if the servers should return the experts of each token.
        """
        versions = None if weight_version is None else range(weight_version, weight_version + 1)
        pending = self.submit(prompts, group_size, sampling, seed, versions, routes=routes)
        try:
            return [group for _, batch in pending for group in batch.result()]
        finally:
            for _, batch in pending:
                batch.cancel()

    def submit(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: Sequence[int],
        weight_versions: range | None = None,
        *,
        indices: Collection[int] | None = None,
        routes: RouteShape | None = None,
    ) -> list[tuple[int, Future[list[Group]]]]:
        """Request responses without waiting; return (index of the first prompt, future groups) for each batch.

        Args:
            prompts: the prompts.
            group_size: responses per prompt.
            sampling: sampling parameters.
            seed: see ``generate``.
            weight_versions: the weights that may generate a token; None allows any.
            indices: indices of the prompts to answer; None: all. Batches without any of them are skipped, which does
                not change the other batches.
            routes: see ``generate``.
        """
        params = sampling_params(sampling)
        batches = plan_requests(
            prompts, group_size, params, seed, self.sequences_per_request, routes, sampling.keep_mask, self.vocabulary
        )
        starts = accumulate((len(batch.prompts) for batch in batches), initial=0)
        return [
            (start, self._loop.start(self._groups(batch, weight_versions)))
            for start, batch in zip(starts, batches, strict=False)
            if indices is None or not set(indices).isdisjoint(range(start, start + len(batch.prompts)))
        ]

    def score(self, sequences: Sequence[Sequence[int]], weight_version: int | None = None) -> list[np.ndarray]:
        """Return the engine's log-probs, in nats, of each sequence's tokens but the first, at temperature 1."""
        requests = [
            GenerationRequest(f"score/{i}", tuple(ids), {"max_new_tokens": 0}) for i, ids in enumerate(sequences)
        ]
        size = self.sequences_per_request
        units = [requests[i : i + size] for i in range(0, len(requests), size)]
        versions = None if weight_version is None else range(weight_version, weight_version + 1)
        answers = self._loop.call(gather_or_cancel([self._generate(unit, versions) for unit in units]))
        return [result.input_logprobs for results in answers for result in results]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> UpdateReport:
        """Push weights, under checkpoint names, to all servers; a server that fails leaves the fleet.

        The tensors are taken from the iterable in the calling thread, bucket by bucket, so it may use collectives.
        """
        copy: list[NamedTensors] = []
        try:
            transport = self.sync.transport
            update = self.begin_push(version)
            transport.open()
            send = bucket_sender(update, copy if self.keep_weights else None)
            send_buckets(self._loop.start, send, transport.buckets(named_tensors), transport.in_flight)
            transport.join(update)
            return self.end_push(update, version, copy)
        finally:
            self.release_push()

    def begin_push(self, version: int) -> WeightUpdate:
        """Pause the servers for a push and return the update; ``update`` makes these three calls itself."""
        return self._loop.call(self.sync.begin(self.members, version))

    def end_push(self, update: WeightUpdate, version: int, copy: list[NamedTensors]) -> UpdateReport:
        """Finish a push whose tensors have been sent; ``copy`` is for servers that come back before the next one."""
        return self._loop.call(self.sync.end(update, version, copy))

    def release_push(self) -> None:
        """Resume the servers after a push, whether it succeeded or failed."""
        self._loop.call(self.sync.release())

    def close(self) -> None:
        """Stop the servers that this fleet started, and the thread; closing again has no effect."""
        if self._loop.is_open:
            self._loop.call(self._close())
            self._loop.close()
        for member in self._all_members():
            if member.process is not None:
                member.process.stop()

    def _all_members(self) -> list[Member]:
        return [*self.members, *([self.router.member] if self.router else [])]

    # The methods below run on the event loop.

    async def _open(self) -> None:
        await gather_or_cancel([wait_until_healthy(member, self.timeouts) for member in self._all_members()])
        await gather_or_cancel([self.membership.require_form(member) for member in self.members])
        for member in self.members:
            member.version = await member.client.version()
            member.join()
            self.membership.monitor(member, self.dispatcher.wake)
        if self.router is not None:
            self.router.member.join()
            self.membership.monitor(self.router.member, self.dispatcher.wake, self.router.catch_up)
        if self.registry is not None:
            self.membership.follow(self.registry, self.dispatcher.wake)

    async def _close(self) -> None:
        await self.membership.close()

    async def _groups(self, batch: RequestBatch, versions: range | None) -> list[Group]:
        parts = await gather_or_cancel([self._responses(request, versions) for request in batch.requests])
        return batch.groups([response for part in parts for response in part])

    async def _responses(self, request: HttpRequest, versions: range | None) -> list[Response]:
        results = await self._generate(request.sequences, versions)
        if self.multi_turn is None:
            responses = request.responses(results)
            return responses if self.text_of is None else [replace(r, text=self.text_of(r)) for r in responses]
        return await self.multi_turn.finish(request, results, partial(self._generate, versions=versions))

    async def _require(self, versions: range) -> None:
        """Bring the fleet's weights to every ready server; raise if their version is not among the allowed ones."""
        await self.sync.wait_until_serving()
        version = self.sync.version or str(versions[0])
        if int(version) not in versions:
            version = str(versions[-1])  # no server has it, and the error names it
        behind = [member for member in self.members if member.ready and member.version != version]
        await gather_or_cancel([self._require_of(member, version) for member in behind])

    async def _require_of(self, member: Member, version: str) -> None:
        try:
            await self.sync.require(member, version)
        except ServerUnreachable as error:
            member.leave(error, self.timeouts)

    async def _generate(self, requests: Sequence[GenerationRequest], versions: range | None) -> list[GenerationResult]:
        """Return the results of one HTTP request, from the first server that completes it."""
        allowed = None if versions is None else frozenset(map(str, versions))
        number = next(self._numbers)
        errors: list[str] = []
        results = PartialResults(requests, self.decode)
        for attempt in count():
            if len(errors) == self.timeouts.attempts:
                break
            if versions is not None:
                await self._require(versions)
            # The router gets the first attempt only: later ones go to a server chosen here.
            plain = requests[0].routes is None and not requests[0].keep_mask and requests[0].max_new_tokens > 0
            via_router = plain and not attempt
            # An abandoned request may still run on its server, so its id is not used again.
            remaining = results.remaining(f"@{attempt}" if attempt else "")
            member = await self.dispatcher.choose(number, remaining, allowed, errors, use_router=via_router)
            pushes = self.sync.pushes
            try:
                answers = await member.generate(remaining, allowed)
                aborted = sum(answer.finish_reason == "abort" for answer in answers)
                if not aborted or (self.decode and self.sync.pushes > pushes):
                    if complete := results.add(answers):
                        return complete
                    continue
                # An abort is not the server's failure. The whole request is repeated, with the same results.
                errors.append(f"{member.url} aborted {aborted} of {len(answers)} sequences")
            except RequestRefused:
                raise
            except ReceiverEnded as error:
                errors.append(str(error))
            except RolloutError as error:
                errors.append(str(error))
                member.leave(error, self.timeouts)
            finally:
                self.dispatcher.wake()
        raise RolloutError(f"gave up on {len(requests)} sequences after {len(errors)} attempts: " + "; ".join(errors))


async def gather_or_cancel(coroutines: Sequence[Coroutine[object, object, T]]) -> list[T]:
    """Return the results of all coroutines; if one fails, cancel the others and raise its error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
