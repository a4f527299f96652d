"""The fleet that a configuration asks for: servers of our own, or running ones, and the carrier of weights to them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, RolloutError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.members import Patience
from megatron_rl.rollout.process import ServerProcess, embedded_server
from megatron_rl.rollout.sglang import sglang_server
from megatron_rl.weights.disk import DiskCarrier
from megatron_rl.weights.protocol import Carrier
from megatron_rl.weights.tensor import TensorCarrier

END = "end"
"""Name of the file in a registry that says that the run is over."""


def open_fleet(run: Run) -> Fleet:
    """Start or find the servers and wait until all are healthy.

    Raises:
        ConfigError: servers of this engine cannot be started from here.
        RolloutError: one did not become healthy.
    """
    rollout = run.rollout
    patience = Patience(
        request_timeout_seconds=rollout.request_timeout_seconds,
        start_timeout_seconds=rollout.start_timeout_seconds,
        attempts=rollout.attempts,
    )
    servers: Sequence[str | ServerProcess] = rollout.urls or [server_of(run, n) for n in range(rollout.servers)]
    if rollout.registry:
        servers = registered(Path(rollout.registry), rollout.servers, rollout.start_timeout_seconds)
    return Fleet(servers, _carrier(run), patience, rollout.rows_per_request, rollout.requests_per_server)


def registered(folder: Path, count: int, timeout_seconds: float) -> list[str]:
    """Wait until that many servers have written their address; return their URLs, each once.

    Raises:
        RolloutError: they did not come in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while len(found := sorted(folder.glob("server_*.json"))) < count:
        if time.monotonic() > deadline:
            raise RolloutError(
                f"{len(found)} of {count} servers (rollout.servers) have registered in {folder} (rollout.registry)"
                f" within {timeout_seconds:g} s; see their logs; raise rollout.start_timeout_seconds if they are slow"
            )
        time.sleep(0.2)
    return [json.loads(path.read_text())["url"] for path in found]


def server_of(run: Run, number: int, host: str = "127.0.0.1") -> ServerProcess:
    """Return a server of the configured engine, not started yet.

    Raises:
        ConfigError: servers of this engine cannot be started from here.
    """
    rollout, dtype = run.rollout, run.model.dtype
    log = Path(run.log.path) / "servers" / f"server_{number}.log"
    if rollout.engine == "sglang" and rollout.sglang_python:
        options = {"dtype": dtype, **rollout.sglang}
        return sglang_server(rollout.sglang_python, run.model.path, log, options, rollout.environment, host)
    if rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.engine = {rollout.engine!r} without rollout.urls: start the servers yourself, in their own "
            "environment, and give their urls"
        )
    options = ["--dtype", dtype, "--weight-version", "0"]
    return embedded_server(run.model.path, log, options, host, environment=rollout.environment)


def _carrier(run: Run) -> Carrier:
    if run.weights.carrier == "disk":
        return DiskCarrier(run.weights.bucket_bytes, Path(run.log.path) / "weights", Path(run.model.path))
    return TensorCarrier(run.weights.bucket_bytes)
