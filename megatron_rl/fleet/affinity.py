"""Which server to ask: the one with the least to do, or the one that has the prompt's beginning in its cache."""

from collections import OrderedDict
from collections.abc import Sequence

from megatron_rl.fleet.members import Member
from megatron_rl.fleet.protocol import SampleRequest

PREFIX_TOKENS = 64
"""Prompts that begin with this many equal tokens go together: turns of one conversation, pieces of one response."""

KEPT = 8192
"""Newest prefixes that are remembered."""


class Affinity:
    """Remembers who was asked last for a prefix; a push empties every cache, and so this memory."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[int, ...], Member] = OrderedDict()
        self._pushes = 0

    def choose(self, free: Sequence[Member], requests: Sequence[SampleRequest], pushes: int) -> Member:
        """Return the server for these requests, of those that have room.

        The one that knows the prefix is taken if it is behind the least busy one by no more than these requests.

        Args:
            free: at least one.
            requests: of one prompt, or several; the first one's prefix counts.
            pushes: how often weights were pushed.
        """
        if pushes != self._pushes:
            self._last.clear()
            self._pushes = pushes
        least = min(free, key=lambda member: member.rows)
        prefix = requests[0].input_ids[:PREFIX_TOKENS]
        known = self._last.pop(prefix, None)
        near = known is not None and known in free and known.rows - least.rows <= len(requests)
        chosen = known if near and known is not None else least
        self._last[prefix] = chosen
        if len(self._last) > KEPT:
            self._last.popitem(last=False)
        return chosen
