"""``python -m megatron_rl.tasks.verifier_host``: verifies on this host for runs on other hosts.

    controller --TCP--> this process: checks the key, then starts ``tasks.worker`` on the connection

The messages are those of ``tasks.wire``, JSON only. Each connection has worker processes of its own, which end with it
and with this process. A run can name a file with a function as its verifier, so who has the key can run code here.
"""

import argparse
import contextlib
import hmac
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.tasks import wire
from megatron_rl.tasks.host_registry import add_host
from megatron_rl.util.child_process import ending_with_parent

log = logging.getLogger(__name__)
KEY = "MEGATRON_RL_VERIFIER_KEY"
"""Environment variable with the key that verifier hosts ask for."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GREETING_BYTES = 4096
_GREETING_SECONDS = 5.0
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 10, 5, 3
_POLL_SECONDS = 1.0


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel close a connection whose other host is gone, within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": _IDLE_SECONDS, "TCP_KEEPINTVL": _PROBE_SECONDS, "TCP_KEEPCNT": _PROBES}
    options["TCP_USER_TIMEOUT"] = 1000 * (_IDLE_SECONDS + _PROBE_SECONDS * _PROBES)
    for name, value in options.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_line(connection: socket.socket, limit: int, seconds: float) -> bytes:
    """Return a line of a connection, byte by byte: what follows is for another process.

    Raises:
        OSError: the connection broke off, or the line did not come in time.
    """
    line, deadline = bytearray(), time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) < limit:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if not (byte := connection.recv(1)):
            break
        line += byte
    connection.settimeout(None)
    return bytes(line)


class VerifierHost:
    """Accepts connections, and starts verifying processes for those that know the key; one greeting at a time."""

    def __init__(self, listener: socket.socket, key: str) -> None:
        self._listener, self._key = listener, key.encode()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def serve(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set; then end all processes."""
        self._listener.settimeout(_POLL_SECONDS)
        try:
            while not stop.is_set():
                self._processes = {process for process in self._processes if process.poll() is None}
                with contextlib.suppress(TimeoutError):
                    connection, _ = self._listener.accept()
                    self._greet(connection)
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def _greet(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # a connection that breaks off costs nothing
            if not self._knows_key(read_line(connection, _GREETING_BYTES, _GREETING_SECONDS)):
                connection.sendall(wire.encode_line({"error": f"wrong key ({KEY})"}))
                return
            connection.sendall(wire.encode_line({"ok": True}))
            keep_alive(connection)
            # The thread of the main loop starts it, so that it ends with this process.
            command = ending_with_parent([sys.executable, "-m", "megatron_rl.tasks.worker"])
            self._processes.add(subprocess.Popen(command, stdin=connection.fileno(), stdout=connection.fileno()))

    def _knows_key(self, line: bytes) -> bool:
        try:
            greeting = json.loads(line)
        except ValueError:
            return False
        key = greeting.get("key") if isinstance(greeting, dict) else None
        return isinstance(key, str) and hmac.compare_digest(key.encode("utf-8", "replace"), self._key)


def run_host(host: str, port: int, registry: Path | None, advertised: str | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: other hosts could connect without a key, or the address cannot be used.
    """
    key = os.environ.get(KEY, "")
    if host not in _LOOPBACK and not key:
        raise ConfigError(
            f"--host {host} lets other hosts run code here; set a secret of your own in {KEY}, here and for the run"
        )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} (--host, --port): {error.strerror}") from error
    with listener, contextlib.ExitStack() as stack:
        address = f"{advertised or host}:{listener.getsockname()[1]}"
        if registry is not None:
            stack.enter_context(add_host(registry, address))
        log.warning("verifies at %s", address)
        VerifierHost(listener, key).serve(stop)


def main() -> int:
    """Serve with the options of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_rl.tasks.verifier_host", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--registry", type=Path, help="folder of the run's reward.registry, to add the address to")
    parser.add_argument("--address", help="name or address for other hosts, if --host is 0.0.0.0")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        run_host(options.host, options.port, options.registry, options.address)
    except MegatronRLError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
