"""Server processes that this process starts, watches and stops."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import megatron_rl
from megatron_rl.errors import DataError
from megatron_rl.util.child_process import ending_with_parent
from megatron_rl.util.ports import check_port, free_port, reserve_port

log = logging.getLogger(__name__)
_TAIL_BYTES = 2000


class ServerProcess:
    """A server process.

    Start it from a thread that outlives it, see ``util.child_process``.
    """

    def __init__(
        self,
        command: Sequence[str],
        host: str,
        port: int,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        grace_seconds: float = 5.0,
    ) -> None:
        self.command = list(command)
        self.environment = dict(os.environ if environment is None else environment)
        self.host, self.port, self.log_path = host, port, log_path
        self.grace_seconds = grace_seconds
        """Seconds between SIGTERM and SIGKILL."""
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation: socket.socket | None = None  # from the first start until ``stop``

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, f"{self.url} was never started"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """The exit status; None while the process runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the command in a new process group, without waiting until the server answers."""
        if self._reservation is None:
            self._reservation = reserve_port(self.host, self.port)
        else:
            check_port(self.host, self.port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as sink:
            self._process = subprocess.Popen(
                ending_with_parent(self.command),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
                env=self.environment,
            )
        log.info("Started server %s as process %d; its log is %s", self.url, self._process.pid, self.log_path)

    def stop(self) -> None:
        """Send SIGTERM, after ``grace_seconds`` SIGKILL; return when the process has ended."""
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None
        if self._process is None or self._process.poll() is not None:
            return
        # Only the main process gets the signal: SGLang treats a child that ends first as a crash.
        self._process.terminate()
        try:
            self._process.wait(self.grace_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        if not self.log_path.is_file():
            return ""
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")


def embedded_server(
    model_path: str,
    log_path: Path,
    options: Sequence[str] = (),
    host: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Return an embedded server that is not started yet; ``options`` are those of ``megatron-rl serve``."""
    require_model(model_path)
    port = free_port(host)
    command = [
        sys.executable,
        "-m",
        "megatron_rl.inference_server.serve",
        model_path,
        "--host",
        host,
        "--port",
        str(port),
    ]
    package_root = str(Path(megatron_rl.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, "PYTHONPATH": search_path, **(environment or {})}
    return ServerProcess([*command, *options], host, port, log_path, variables)


def require_model(path: str) -> None:
    """Check that the folder has a checkpoint.

    Raises:
        DataError: config.json is missing.
    """
    if not (Path(path) / "config.json").is_file():
        raise DataError(f"no model at {path}: config.json is missing; give the folder of a Hugging Face checkpoint")
