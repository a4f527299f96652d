"""Server processes of our own: started, watched, stopped; never another's."""

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
from megatron_rl.errors import DataError, RolloutError

log = logging.getLogger(__name__)
_TAIL_BYTES = 2000


def guarded(command: Sequence[str]) -> list[str]:
    """Return the command wrapped so that its process ends with this one, even if this one is killed."""
    return [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(os.getpid()), *command]


class ServerProcess:
    """A server that this process starts and stops. Start it from a thread that lives on: see ``guard``."""

    def __init__(
        self, command: Sequence[str], host: str, port: int, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self.environment = dict(os.environ if environment is None else environment)
        self.host, self.port, self.log_path = host, port, log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, f"{self.url} was never started"
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the command in a process group of its own; does not wait until it answers."""
        check_port(self.host, self.port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as sink:
            self._process = subprocess.Popen(
                guarded(self.command),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                process_group=0,
                env=self.environment,
            )
        log.info("started %s as process %d, log in %s", self.url, self._process.pid, self.log_path)

    def stop(self, grace_seconds: float = 5.0) -> None:
        """End it, politely first; returns when it is gone."""
        if self._process is None or self._process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            break

    def log_tail(self) -> str:
        """Return the end of its log."""
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
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Return an embedded server, not started yet; ``options`` as on the command line of ``megatron-rl serve``."""
    require_model(model_path)
    port = free_port(host) if port is None else port
    command = [sys.executable, "-m", "megatron_rl.rollout.serve", model_path, "--host", host, "--port", str(port)]
    package_root = str(Path(megatron_rl.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, "PYTHONPATH": search_path, **(environment or {})}
    return ServerProcess([*command, *options], host, port, log_path, variables)


def require_model(path: str) -> None:
    """Raise if there is no checkpoint at the path."""
    if not (Path(path) / "config.json").is_file():
        raise DataError(f"no model at {path}: config.json is missing; give the folder of a Hugging Face checkpoint")


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise if the port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RolloutError(
                f"cannot start a server on {host}:{port}: {error.strerror}; choose another port"
            ) from error
