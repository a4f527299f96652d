"""Turns: ranks that do something one after the other, and wait in host memory."""

from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_rl.distributed.main_rank import WAIT_SECONDS, store


class Turns:
    """Rounds in which rank after rank has its turn; each rank has one and uses it in every round.

    Args:
        name: distinguishes these turns from others.
        index: this rank's place in a round, from 0.
        count: number of places.
    """

    def __init__(self, name: str, index: int, count: int) -> None:
        self._name, self._index, self._count = name, index, count
        self._round = 0

    def wait(self) -> None:
        """Wait until it is this rank's turn."""
        self._round += 1
        if self._index == 0:
            return
        key = self._key(self._index)
        while not store().check([key]):
            with suppress(dist.DistStoreError):  # the time of one call is over
                store().wait([key], timedelta(seconds=WAIT_SECONDS))
        store().delete_key(key)

    def end(self) -> None:
        """Let the next rank have its turn."""
        if self._index + 1 < self._count:
            store().set(self._key(self._index + 1), "begin")

    def _key(self, index: int) -> str:
        return f"megatron_rl/turns/{self._name}/{self._round}/{index}"
