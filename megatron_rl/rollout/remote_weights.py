"""Pushes of weights whose tensors are in the main rank's process and whose fleet is in the controller's.

    main rank                                           controller
    push: begin_push(version)  ---------------------->  pauses the servers that are ready
          open the update of these servers  <---------  open_update(urls)
          buckets -> servers, through the transport
          end_push(version)  ------------------------>  asks for the end of the update
          checksums, version  <-----------------------  finish_update
          release_push  ----------------------------->  resumes the servers
    later:                     <----------------------  resend(url): a server that was away is back

The main rank makes the calls of the transport, the controller all others: it alone knows which servers are ready.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.fleet.background import LoopThread
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.peer import Buffer, CallHandler, PeerReply, error_from_json, error_to_json
from megatron_rl.weights.transport import (
    NamedTensors,
    UpdateReport,
    WeightServer,
    WeightTransport,
    WeightUpdate,
    bucket_sender,
    send_buckets,
)

Json = Mapping[str, Any]


class RemoteCall(Protocol):
    """Calls a function of the other process by its name; returns the JSON value."""

    async def __call__(self, name: str, arguments: Json | None = None) -> Any:
        """Call it."""


class PushControl(Protocol):
    """The calls of a push to the controller's process."""

    def call(self, name: str, arguments: Json | None = None) -> Any:
        """Call a function of the controller by its name; return the JSON value."""
        ...


class WeightSender:
    """The main rank's part of the pushes.

    Args:
        transport: brings tensors to servers.
        client: client class of the servers' engine.
        timeout_seconds: limit of a control call.
        keep_weights: whether to keep a copy of the newest weights for servers that come back between two pushes.
    """

    def __init__(
        self, transport: WeightTransport, client: type[Client], timeout_seconds: float, *, keep_weights: bool
    ) -> None:
        self.transport, self._keep_weights = transport, keep_weights
        self._client, self._timeout_seconds = client, timeout_seconds
        self._clients: dict[str, Client] = {}
        self._update: WeightUpdate | None = None
        self._sent: list[NamedTensors] = []
        self._copy: list[NamedTensors] = []

    @property
    def handlers(self) -> Mapping[str, CallHandler]:
        """The functions that the controller calls."""
        return {"open_update": self._open_update, "finish_update": self._finish_update, "resend": self._resend}

    def push(
        self, loop: LoopThread, control: PushControl, named_tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Push weights, under checkpoint names, to all servers; a server that fails leaves the fleet.

        The tensors are taken from the iterable in the calling thread, bucket by bucket, so it may use collectives.
        """
        self._sent = []
        try:
            control.call("begin_push", {"version": version})
            update = self._update
            assert update is not None, "begin_push opens it"
            self.transport.open()
            send = bucket_sender(update, self._sent if self._keep_weights else None)
            send_buckets(loop.start, send, self.transport.buckets(named_tensors), self.transport.in_flight)
            self.transport.join(update)
            control.call("end_push", {"version": version})
        finally:
            control.call("release_push")

    async def close(self) -> None:
        """Close the connections to the servers."""
        await self.transport.close()
        for client in self._clients.values():
            await client.close()

    def _server(self, url: str) -> Client:
        if url not in self._clients:
            self._clients[url] = self._client(url, None, self._timeout_seconds, retries=2)
        return self._clients[url]

    async def _open_update(self, arguments: Json, _data: Buffer) -> PeerReply:
        servers = [self._server(url) for url in arguments["urls"]]
        self._update = await self.transport.begin(servers, arguments["version"])
        return PeerReply()

    async def _finish_update(self, _arguments: Json, _data: Buffer) -> PeerReply:
        assert self._update is not None, "was opened"
        report = await self._update.finish()
        self._copy = self._sent
        return PeerReply(report_to_json(report))

    async def _resend(self, arguments: Json, _data: Buffer) -> PeerReply:
        """Bring the newest weights to one server; the value is None if its tensors would have to be sent again."""
        servers: list[WeightServer] = [self._server(arguments["url"])]
        report = await self.transport.resend(servers, arguments["version"])
        if report is None and self._copy:
            update = await self.transport.begin(servers, arguments["version"])
            for bucket in self._copy:
                await update.send(bucket)
            report = await update.finish()
        return PeerReply(None if report is None else report_to_json(report))


class RemoteTransport(WeightTransport):
    """The controller's view of the transport that the main rank has."""

    bucket_bytes = 0

    def __init__(self, call: RemoteCall) -> None:
        self.call = call

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Let the main rank open an update of these servers."""
        await self.call("open_update", {"urls": [server.url for server in servers], "version": version})
        return _RemoteUpdate(list(servers), version, self.call)

    async def resend(self, servers: Sequence[WeightServer], version: int) -> UpdateReport | None:
        """Let the main rank bring its newest weights to a server."""
        [server] = servers
        fields = await self.call("resend", {"url": server.url, "version": version})
        return None if fields is None else report_from_json(fields)


class _RemoteUpdate(WeightUpdate):
    def __init__(self, servers: list[WeightServer], version: int, call: RemoteCall) -> None:
        super().__init__(servers, version)
        self._call = call

    async def finish(self) -> UpdateReport:
        return report_from_json(await self._call("finish_update"))

    async def _send(self, bucket: NamedTensors) -> None:
        raise AssertionError(f"{len(bucket)} tensors are in the wrong process")

    async def _apply(self) -> None:
        raise AssertionError("the main rank applies the update")


def report_to_json(report: UpdateReport) -> Json:
    """Return a report as JSON."""
    return {**vars(report), "failed": {url: error_to_json(error) for url, error in report.failed.items()}}


def report_from_json(fields: Json) -> UpdateReport:
    """Return the report that ``report_to_json`` encoded."""
    failed = {url: error_from_json(error) for url, error in fields["failed"].items()}
    errors = {url: e if isinstance(e, RolloutError) else RolloutError(str(e)) for url, e in failed.items()}
    return UpdateReport(fields["version"], fields["num_tensors"], fields["num_bytes"], fields["seconds"], errors)
