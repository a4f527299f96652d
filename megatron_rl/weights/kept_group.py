"""A torch.distributed group of a sender and all ranks of all servers, kept from push to push.

The group is opened again, under another name, when the servers are not those of the last bucket, or when a bucket
fails: one server that ends breaks the group of all. A server is blamed if it does not answer any more, or if it refuses
a bucket that comes through a new group.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import urlsplit

import torch

from megatron_rl.errors import RolloutError
from megatron_rl.weights.flat_bucket import FlatBucket
from megatron_rl.weights.transport import WeightReceiver, WeightServer
from megatron_rl.weights.weight_group import Backend, Rendezvous, WeightGroup, local_address, run_in_thread

_ATTEMPTS = 3
_PROBE_SECONDS = 10.0
"""A server that does not answer a short request within this time has failed."""
_GRACE_SECONDS = 2.0
"""Time for the others to answer after the first error, which may have nothing to do with them."""
Errors = dict[str, RolloutError]
Servers = Mapping[str, WeightServer]


class KeptGroup:
    """Broadcasts flat buckets to servers, one at a time; use it from one event loop.

    Args:
        backend: the group's backend.
        device: device from which buckets are sent.
        timeout_seconds: limit for all servers to join.
    """

    def __init__(self, backend: Backend, device: torch.device, timeout_seconds: float) -> None:
        self._backend, self._device, self._timeout_seconds = backend, device, timeout_seconds
        self._group: WeightGroup | None = None
        self._name = ""
        self._urls: tuple[str, ...] = ()

    async def send(self, bucket: FlatBucket, receivers: Sequence[WeightReceiver], servers: Servers) -> Errors:
        """Send a bucket to all receivers; return why servers do not have it."""
        failed: Errors = {}
        errors: Errors = {}
        for _ in range(_ATTEMPTS):
            left = [receiver for receiver in receivers if receiver.url not in failed]
            if not left:
                return failed
            is_new = self._urls != tuple(receiver.url for receiver in left)
            errors = await self._open(left, servers) if is_new else {}
            errors = errors or await self._broadcast(bucket, servers)
            if not errors:
                return failed
            if is_new and self._group is not None:  # the others have the bucket: these servers refuse it
                return failed | errors
            answers = await asyncio.gather(*(_answers(servers[url]) for url in errors))
            failed |= {url: errors[url] for url, alive in zip(errors, answers, strict=True) if not alive}
            await self._leave(servers)
        return errors | failed

    async def close(self, server_of: Callable[[str], WeightServer]) -> None:
        """Leave the group."""
        await self._leave({url: server_of(url) for url in self._urls})

    async def _open(self, receivers: Sequence[WeightReceiver], servers: Servers) -> Errors:
        """Open a group with these servers; return why some did not join, in which case there is none."""
        await self._leave(servers)
        hosts = [urlsplit(receiver.url).hostname or "" for receiver in receivers]
        remote = next((host for host in hosts if not local_address(host).startswith("127.")), hosts[0])
        rendezvous = Rendezvous.listen(remote, self._timeout_seconds)
        name, size = f"megatron-rl-{uuid.uuid4().hex}", 1 + sum(receiver.ranks for receiver in receivers)
        loop, backend = asyncio.get_running_loop(), self._backend
        opened: asyncio.Future[WeightGroup | BaseException] = loop.create_future()

        def deliver(result: WeightGroup | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: opened.done() or opened.set_result(result))

        run_in_thread(lambda: WeightGroup.open(rendezvous, name, 0, size, backend), deliver)
        joins: dict[str, asyncio.Future[None]] = {}
        rank = 1
        for receiver in receivers:
            join = servers[receiver.url].join_group(rendezvous.host, rendezvous.port, size, name, backend, rank)
            joins[receiver.url] = asyncio.ensure_future(join)
            rank += receiver.ranks
        if errors := await _errors_of(joins):
            return errors
        group = await opened
        if isinstance(group, BaseException):
            return {url: RolloutError(f"{url} did not join the group for weights: {group}") for url in joins}
        self._group, self._name, self._urls = group, name, tuple(joins)
        return {}

    async def _broadcast(self, bucket: FlatBucket, servers: Servers) -> Errors:
        """Broadcast a bucket; return why servers do not have it. If servers wait for it in vain, close the group."""
        assert self._group is not None, "was opened"
        name = self._name
        answers = {
            url: asyncio.ensure_future(servers[url].update_from_distributed(bucket.headers, name, is_flat=True))
            for url in self._urls
        }
        works = self._group.broadcast([bucket.data])
        errors = await _errors_of(answers, lambda: self._leave(servers))
        works.clear()
        return errors

    async def _leave(self, servers: Servers) -> None:
        """Close the group here and on the servers that still answer."""
        if self._group is None:
            return
        self._group.close()
        self._group, urls, self._urls = None, self._urls, ()
        await asyncio.gather(*(_succeeds(servers[url].leave_group(self._name)) for url in urls if url in servers))


async def _nothing() -> None:
    return


async def _errors_of(
    calls: Mapping[str, "asyncio.Future[None]"], release: Callable[[], Awaitable[None]] = _nothing
) -> Errors:
    """Return the errors of calls to servers; if one fails, ``release`` the servers that still wait for it."""
    futures = list(calls.values())
    try:
        _, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            _, pending = await asyncio.wait(futures, timeout=_GRACE_SECONDS)
        if pending:
            await release()
            await asyncio.wait(futures, timeout=_GRACE_SECONDS)
    finally:
        for future in futures:
            future.cancel()
    results = await asyncio.gather(*futures, return_exceptions=True)
    errors: Errors = {}
    for url, result in zip(calls, results, strict=True):
        if isinstance(result, asyncio.CancelledError):
            errors[url] = RolloutError(f"{url} was waiting for another server of the group for weights")
        elif isinstance(result, RolloutError):
            errors[url] = result
        elif isinstance(result, BaseException):
            raise result
    return errors


async def _answers(server: WeightServer) -> bool:
    return await _succeeds(server.version())


async def _succeeds(call: Awaitable[object]) -> bool:
    try:
        await asyncio.wait_for(call, _PROBE_SECONDS)
    except (RolloutError, TimeoutError):
        return False
    return True
