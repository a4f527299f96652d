"""How a run stands at this moment: what is queued, how old it is, which servers are well. Read when somebody asks.

Everything here is known already, to the buffer and to the fleet; both go on while another thread reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rl.rollout.fleet import Fleet
from megatron_rl.train.stream import Stream


@dataclass(frozen=True)
class Reading:
    """A number, and what it is of.

    Attributes:
        name: of the gauge, without the prefix that all share.
        words: what it tells.
        value: now.
        labels: which of several of that name it is.
    """

    name: str
    words: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def readings(stream: Stream, fleet: Fleet) -> list[Reading]:
    """Return the queue's depth and age, and a row of numbers for every server."""
    return [*_queue(stream, fleet), *_servers(fleet)]


def _queue(stream: Stream, fleet: Fleet) -> list[Reading]:
    plans = list(stream.buffer.plans.values())
    held = [held.group for plan in plans for held in list(plan.held.values())]
    known = [group.oldest_version for group in held if group.oldest_version >= 0]
    newest = int(fleet.sync.version or 0)
    words = "groups of the steps to come"
    return [
        Reading("queue_groups", words, sum(len(plan.coming) for plan in plans), {"state": "in the making"}),
        Reading("queue_groups", words, len(held), {"state": "finished"}),
        Reading("queue_steps", "steps that groups are gathered for", len(plans)),
        Reading(
            "queue_lag",
            "weight versions that the oldest finished group in the queue is behind the fleet",
            max((newest - version for version in known), default=0),
        ),
    ]


def _servers(fleet: Fleet) -> list[Reading]:
    newest = int(fleet.sync.version or 0)
    found = [Reading("servers_up", "servers that take requests", len(fleet.urls))]
    for member in fleet.members:
        version = int(member.version) if member.version.isdigit() else 0
        for name, words, value in (
            ("server_up", "1 while the server takes requests", float(member.ready)),
            ("server_requests", "requests that it works on", len(member.requests)),
            ("server_sequences", "sequences that it works on", member.rows),
            ("server_failures", "failures since its last good answer", member.failures),
            ("server_weights_lag", "weight versions that it is behind the fleet", newest - version),
            ("server_busy_seconds", "how long it has had work, since the start", member.busy_seconds),
        ):
            found.append(Reading(name, words, value, {"server": member.url}))
    return found
