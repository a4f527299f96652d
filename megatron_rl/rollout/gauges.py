"""The current state of the sample queue and the servers, as gauges.

The buffer and the fleet keep working while another thread reads these values.
"""

from collections.abc import Iterator, Mapping

from megatron_rl.fleet.fleet import Fleet
from megatron_rl.rollout.stream import Stream

Gauge = tuple[str, str, float, Mapping[str, str]]
"""Name, description, value, and the labels that distinguish gauges of the same name."""


def gauges(stream: Stream) -> Iterator[Gauge]:
    """Yield the size and age of the queue, and the state of every server."""
    yield from _queue(stream)
    yield from _servers(stream.fleet)


def _queue(stream: Stream) -> Iterator[Gauge]:
    buffer = stream.buffer
    groups = [finished.group for finished in buffer.finished_groups]
    known = [group.oldest_version for group in groups if group.oldest_version >= 0]
    newest = int(stream.fleet.sync.version or 0)
    yield "queue_groups", "groups of future steps", buffer.pending, {"state": "in progress"}
    yield "queue_groups", "groups of future steps", len(groups), {"state": "finished"}
    yield "queue_steps", "steps for which groups are sampled", buffer.steps, {}
    lag = max((newest - version for version in known), default=0)
    yield "queue_lag", "weight versions that the oldest finished group in the queue is behind the fleet", lag, {}


def _servers(fleet: Fleet) -> Iterator[Gauge]:
    newest = int(fleet.sync.version or 0)
    yield "servers_up", "servers that take requests", len(fleet.urls), {}
    for member in fleet.members:
        version = int(member.version) if member.version.isdigit() else 0
        for name, description, value in (
            ("server_up", "1 while the server takes requests", float(member.ready)),
            ("server_requests", "requests in progress", len(member.requests)),
            ("server_sequences", "sequences in progress", member.num_sequences),
            ("server_failures", "failures since its last good answer", member.failures),
            ("server_weights_lag", "weight versions that it is behind the fleet", newest - version),
            ("server_busy_seconds", "total time with requests in progress", member.busy_seconds),
        ):
            yield name, description, value, {"server": member.url}
