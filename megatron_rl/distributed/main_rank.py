"""How the other ranks wait for the main rank: in host memory, and knowing what for.

The main rank samples, evaluates and pushes weights while the other ranks have nothing to do. They wait in the store of
torch.distributed and not in a collective of a device, which has a timeout and keeps the device busy. The main rank's
watchdog publishes what the main rank waits for, with a counter: a wait whose counter advances is no hang.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from megatron_rl.distributed.ledger import record_collectives

STATE = "megatron_rl/main_rank"
"""Key of the store with the published wait of the main rank."""

WAIT_SECONDS = 5.0
"""Length of one blocking call to the store, after which the wait is repeated."""


@dataclass(frozen=True)
class Wait:
    """What the main rank waits for.

    Attributes:
        reason: a noun phrase, such as "the samples of step 3".
        progress: counter that advances while there is progress, such as received tokens.
    """

    reason: str
    progress: int

    def to_json(self) -> str:
        """Return the wait as JSON."""
        return json.dumps([self.reason, self.progress])


class MainRank:
    """The waits of one process: announced by the main rank, sat out by the others. Every rank has one."""

    def __init__(self) -> None:
        self._announced: list[tuple[str, Callable[[], int]]] = []
        self._number = 0

    @contextmanager
    def waits_for(self, reason: str, progress: Callable[[], int]) -> Iterator[None]:
        """Announce a wait of this process inside a ``with`` block; innermost blocks count.

        Args:
            reason: what for.
            progress: read in another thread; returns a number that changes while there is progress.
        """
        self._announced.append((reason, progress))
        try:
            yield
        finally:
            self._announced.pop()

    def announced(self) -> Wait | None:
        """Return the wait that is announced now; callable in any thread."""
        announced = tuple(self._announced)
        if not announced:
            return None
        reason, progress = announced[-1]
        return Wait(reason, progress())

    def release(self) -> None:
        """Let the other ranks return from ``wait``; called by the main rank."""
        self._number += 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            store().set(f"{STATE}/{self._number}", "done")
            store().delete_key(f"{STATE}/{self._number - 1}")  # the others met this rank since then

    def wait(self) -> None:
        """Wait until the main rank calls ``release``; every rank but the main one calls this equally often."""
        self._number += 1
        ledger, key = record_collectives(), f"{STATE}/{self._number}"
        ends = (dist.get_rank(), 0)  # counted apart from the collectives
        entry = ledger.enter("wait for the main rank", None, 0, "megatron_rl/distributed/main_rank.py", ends)
        while not store().check([key]):
            with suppress(dist.DistStoreError):  # the time of one call is over
                store().wait([key], timedelta(seconds=WAIT_SECONDS))
        ledger.leave(entry)


@cache
def main_rank() -> MainRank:
    """Return the waits of this process."""
    return MainRank()


def store() -> dist.Store:
    """Return the key-value store that the ranks met in."""
    return dist.distributed_c10d._get_default_store()


def connect_again() -> dist.Store:
    """Return another connection to the store: a thread that waits in one blocks all others that use it."""
    clone: Callable[[], dist.Store] = getattr(store(), "clone")  # noqa: B009 (not in torch's stubs)
    return clone()
