"""The current state of a run as gauges: the sample queue and the servers.

The buffer and the fleet keep working while another thread reads these values.
"""

from megatron_rl.fleet.fleet import Fleet
from megatron_rl.observability.gauges import Snapshot
from megatron_rl.rollout.stream import Stream


def readings(stream: Stream, fleet: Fleet) -> list[Snapshot]:
    """Return the queue's depth and age, and a row of numbers for every server."""
    return [*_queue(stream, fleet), *_servers(fleet)]


def _queue(stream: Stream, fleet: Fleet) -> list[Snapshot]:
    plans = list(stream.buffer.plans.values())
    held = [held.group for plan in plans for held in list(plan.finished.values())]
    known = [group.oldest_version for group in held if group.oldest_version >= 0]
    newest = int(fleet.sync.version or 0)
    words = "groups of the steps to come"
    return [
        Snapshot("queue_groups", words, sum(len(plan.pending) for plan in plans), {"state": "in the making"}),
        Snapshot("queue_groups", words, len(held), {"state": "finished"}),
        Snapshot("queue_steps", "steps that groups are gathered for", len(plans)),
        Snapshot(
            "queue_lag",
            "weight versions that the oldest finished group in the queue is behind the fleet",
            max((newest - version for version in known), default=0),
        ),
    ]


def _servers(fleet: Fleet) -> list[Snapshot]:
    newest = int(fleet.sync.version or 0)
    found = [Snapshot("servers_up", "servers that take requests", len(fleet.urls))]
    for member in fleet.members:
        version = int(member.version) if member.version.isdigit() else 0
        for name, words, value in (
            ("server_up", "1 while the server takes requests", float(member.ready)),
            ("server_requests", "requests that it works on", len(member.requests)),
            ("server_sequences", "sequences that it works on", member.num_sequences),
            ("server_failures", "failures since its last good answer", member.failures),
            ("server_weights_lag", "weight versions that it is behind the fleet", newest - version),
            ("server_busy_seconds", "how long it has had work, since the start", member.busy_seconds),
        ):
            found.append(Snapshot(name, words, value, {"server": member.url}))
    return found
