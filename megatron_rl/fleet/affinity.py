"""Chooses a server for a request: the least busy one, or the one that has the prompt's prefix in its cache."""

from collections import OrderedDict
from collections.abc import Sequence

from megatron_rl.fleet.members import Member
from megatron_rl.fleet.protocol import GenerationRequest

PREFIX_TOKENS = 64
"""Requests whose first tokens, up to this many, are equal prefer one server: turns of a conversation, or the remainder
of a response."""
MAX_PREFIXES = 8192
"""Number of newest prefixes that are remembered."""


class PrefixAffinity:
    """Remembers which server was asked last for a prefix. A push empties the servers' caches, and this memory."""

    def __init__(self, slack_sequences: int = 1) -> None:
        self.slack_sequences = slack_sequences
        """How many more sequences than the least busy server the server that knows the prefix may have."""
        self._last: OrderedDict[tuple[int, ...], Member] = OrderedDict()
        self._pushes = 0

    def choose(self, free: Sequence[Member], requests: Sequence[GenerationRequest], pushes: int) -> Member:
        """Return the server for these requests.

        The server that knows the prefix is chosen if it has at most ``slack_sequences``, or ``len(requests)``, more
        sequences than the least busy server.

        Args:
            free: servers that have room, at least one.
            requests: requests of one batch; the first one's prefix counts.
            pushes: number of weight pushes so far.
        """
        if pushes != self._pushes:
            self._last.clear()
            self._pushes = pushes
        least = min(free, key=lambda member: member.num_sequences)
        prefix = requests[0].input_ids[:PREFIX_TOKENS]
        known = self._last.pop(prefix, None)
        slack = max(self.slack_sequences, len(requests))
        near = known is not None and known in free and known.num_sequences - least.num_sequences <= slack
        chosen = known if near and known is not None else least
        self._last[prefix] = chosen
        if len(self._last) > MAX_PREFIXES:
            self._last.popitem(last=False)
        return chosen
