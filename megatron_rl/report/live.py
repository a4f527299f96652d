"""``megatron-rl report --serve RUN...``: the report as a page that follows running runs.

The server listens on 127.0.0.1 only, answers GET only, and refuses requests that name another host, as a web page with
a rebound name would. ``/`` is the page, ``/events`` a stream of server-sent events: one whenever a file of a run
changed.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.observability.file_names import CONFIG, METRICS, MISMATCH, TOKENS
from megatron_rl.util.ports import check_port

HOST = "127.0.0.1"
POLL_SECONDS = 1.0
"""Time between two looks at the files, and largest delay of an event."""

Stamp = tuple[tuple[str, int, int], ...]


class LivePage:
    """The newest page about some runs; it is rendered when it is requested and a file has changed.

    Args:
        folders: run folders.
        render: returns the page.
    """

    def __init__(self, folders: Sequence[Path], render: Callable[[], str]) -> None:
        self._folders, self._render = folders, render
        self._lock = threading.Lock()
        self._stamp, self._html = self.stamp(), render()

    def stamp(self) -> Stamp:
        """Return size and time of the files that the page shows."""
        files = [folder / name for folder in self._folders for name in (CONFIG, METRICS, TOKENS, MISMATCH)]
        found = [(path, path.stat()) for path in files if path.is_file()]
        return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)

    def html(self) -> str:
        """Return the page. While a run folder cannot be read, as when it is moved, the last page stays."""
        with self._lock:
            stamp = self.stamp()
            if stamp != self._stamp:
                try:
                    self._html, self._stamp = self._render(), stamp
                except DataError as error:
                    sys.stderr.write(f"megatron-rl report: {error}\n")
            return self._html


class LiveHandler(BaseHTTPRequestHandler):
    """Answers the requests of browsers on this machine."""

    page: LivePage
    """The page; set by ``make_server``."""
    hosts: tuple[str, ...]
    """Values of the header ``Host`` that are answered."""

    def do_GET(self) -> None:
        """Send the page or the stream of events."""
        if self.headers.get("Host") not in self.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send_page()
        elif self.path == "/events":
            self._send_events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing about requests."""

    def _send_page(self) -> None:
        content = self.page.html().encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _send_events(self) -> None:
        """Send an event per change until the browser leaves; comments in between notice that it left."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        before = self.page.stamp()
        try:
            while True:
                stamp = self.page.stamp()
                self.wfile.write(b"data: changed\n\n" if stamp != before else b":\n\n")
                self.wfile.flush()
                before = stamp
                time.sleep(POLL_SECONDS)
        except ConnectionError:
            return


def make_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """Return a server of the page on 127.0.0.1; port 0 chooses a free one.

    Raises:
        RolloutError: the port is in use.
    """
    if port:
        check_port(HOST, port)
    handler: type[LiveHandler] = type("PageHandler", (LiveHandler,), {"page": page})
    server = ThreadingHTTPServer((HOST, port), handler)
    handler.hosts = (f"{HOST}:{server.server_port}", f"localhost:{server.server_port}")
    server.daemon_threads = True
    return server


def serve(page: LivePage, port: int) -> int:
    """Serve the page until SIGINT or SIGTERM; return 0."""
    server = make_server(page, port)
    try:
        url = f"http://{HOST}:{server.server_port}"
        tunnel = f"ssh -L {server.server_port}:{HOST}:{server.server_port} THIS_MACHINE"
        sys.stdout.write(f"{url} follows the runs until Ctrl-C; from another machine: {tunnel}\n")
        sys.stdout.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        server.server_close()
    return 0
