"""Assigns requests to servers: each waits in line until a server, or the router, has room for its sequences."""

import asyncio
import contextlib
import heapq
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.affinity import PrefixAffinity
from megatron_rl.fleet.members import Member, Timeouts
from megatron_rl.fleet.protocol import GenerationRequest
from megatron_rl.fleet.router import Router
from megatron_rl.fleet.sync import WeightSync

log = logging.getLogger(__name__)
_REPORT_SECONDS = 5.0
"""Interval between two messages about a fleet without servers."""

Versions = frozenset[str] | None
"""The weight versions that may generate a request; None: all."""


@dataclass(order=True)
class _Place:
    """A place in a line."""

    number: int
    wake: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


@dataclass(eq=False)
class Dispatcher:
    """One line of waiting requests per set of allowed versions, in order of their numbers.

    Only the first request of a line looks for a server; the one behind it is woken when it has left. So a freed server
    costs one wake-up per line, not one per waiting request.
    """

    members: Sequence[Member]
    sync: WeightSync
    timeouts: Timeouts
    sequences_per_server: int
    router: Router | None = None
    _lines: dict[Versions, list[_Place]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._affinity = PrefixAffinity(self.sequences_per_server // 16)
        self._last_report = 0.0

    def wake(self) -> None:
        """Make the first request of every line look again: a server may have become ready or free."""
        for line in self._lines.values():
            line[0].wake.set()

    async def choose(
        self,
        number: int,
        requests: Sequence[GenerationRequest],
        versions: Versions,
        errors: Sequence[str],
        *,
        use_router: bool,
    ) -> Member:
        """Wait until a ready server, or the router, has room; return it. None is chosen during a push.

        Args:
            number: place in the line; a request that is repeated keeps its number, and so does not wait again.
            requests: sequences of one HTTP request.
            versions: weight versions that may generate them.
            errors: previous failures, for the error's message.
            use_router: whether the router may take them.

        Raises:
            RolloutError: no server was ready for ``start_timeout_seconds``.
        """
        place = _Place(number)
        line = self._lines.setdefault(versions, [])
        heapq.heappush(line, place)
        try:
            last_ready = time.monotonic()
            while True:
                if line[0] is place:
                    await self.sync.wait_until_serving()
                    if (chosen := await self._free_member(requests, versions, use_router)) is not None:
                        return chosen
                    last_ready = self._check(last_ready, versions, errors)
                    await self._wait(place, self.timeouts.probe_seconds)
                else:
                    await self._wait(place, None)
                    last_ready = time.monotonic()
        finally:
            line.remove(place)
            heapq.heapify(line)
            if line:
                line[0].wake.set()
            else:
                self._lines.pop(versions, None)

    async def _free_member(
        self, requests: Sequence[GenerationRequest], versions: Versions, use_router: bool
    ) -> Member | None:
        ready = self._ready(versions)
        if use_router and self.router is not None:
            await self.router.set_workers([member.url for member in ready])
            if self.router.has_room(ready, len(requests), self.sequences_per_server):
                return self.router.member
        free = [member for member in ready if member.has_room(len(requests), self.sequences_per_server)]
        return self._affinity.choose(free, requests, self.sync.pushes) if free else None

    def _ready(self, versions: Versions) -> list[Member]:
        return [m for m in self.members if m.ready and (versions is None or m.version in versions)]

    def _check(self, last_ready: float, versions: Versions, errors: Sequence[str]) -> float:
        """Return when a server was last ready; report the wait for one, and raise if it is too long."""
        now = time.monotonic()
        if self._ready(versions):
            return now
        waited, limit = now - last_ready, self.timeouts.start_timeout_seconds
        reasons = "; ".join(f"{m.url}: {m.reason or f'has weights {m.version}'}" for m in self.members)
        reasons = reasons or "none is registered (rollout.registry)"
        if waited > limit:
            before = f"; before that: {'; '.join(errors)}" if errors else ""
            raise RolloutError(f"no rollout server for {limit:g} s: {reasons}{before}")
        if min(waited, now - self._last_report) > _REPORT_SECONDS:
            self._last_report = now
            log.warning(
                "No rollout server for %.0f s; the run ends after %g s (rollout.start_timeout_seconds): %s",
                waited,
                limit,
                reasons,
            )
        return last_ready

    async def _wait(self, place: _Place, seconds: float | None) -> None:
        place.wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(place.wake.wait(), seconds)
