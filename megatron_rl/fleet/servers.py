"""The servers of a run: running ones, registered ones, or processes that the run starts."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, RolloutError
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.fleet.sglang import sglang_server
from megatron_rl.fleet.vllm import vllm_server
from megatron_rl.util.atomic import replace_text

END = "end"
"""Name of the file in a registry that says that the run has ended."""


def servers_of(run: Run) -> Sequence[str | ServerProcess]:
    """Return the urls of running servers, or server processes that are not started yet.

    Raises:
        ConfigError: the run cannot start servers of this engine.
        RolloutError: not all servers have registered in time.
    """
    rollout = run.rollout
    if rollout.registry:
        # They may be registered only once they are healthy, which may take start_timeout_seconds.
        return registered(Path(rollout.registry), rollout.servers, 2 * rollout.start_timeout_seconds)
    return rollout.urls or [server_of(run, number) for number in range(rollout.servers)]


def write_address(folder: Path, number: int, url: str) -> None:
    """Register a server's address in the folder."""
    replace_text(folder / f"server_{number}.json", json.dumps({"url": url}) + "\n")


def registered(folder: Path, count: int, timeout_seconds: float) -> list[str]:
    """Wait until ``count`` servers have registered; return their urls.

    Raises:
        RolloutError: not all servers have registered in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while len(found := sorted(folder.glob("server_*.json"))) < count:
        if time.monotonic() > deadline:
            missing = [str(number) for number in range(count) if not (folder / f"server_{number}.json").exists()]
            raise RolloutError(
                f"{len(found)} of {count} servers (rollout.servers) have registered in {folder} (rollout.registry)"
                f" within {timeout_seconds:g} s, {', '.join(missing)} have not; see their logs; raise"
                " rollout.start_timeout_seconds if they are slow"
            )
        time.sleep(0.2)
    return [json.loads(path.read_text())["url"] for path in found]


def server_of(run: Run, number: int, host: str = "127.0.0.1") -> ServerProcess:
    """Return a server of the configured engine that is not started yet.

    Raises:
        ConfigError: the run cannot start servers of this engine.
    """
    rollout, dtype = run.rollout, run.rollout.dtype or run.model.dtype
    log = Path(run.log.path) / "servers" / f"server_{number}.log"
    routes = {"enable_return_routed_experts": True} if rollout.routing_replay in ("report", "r3") else {}
    if rollout.engine == "sglang" and rollout.sglang_python:
        options = {"dtype": dtype, **routes, **rollout.sglang}
        return sglang_server(rollout.sglang_python, run.model.path, log, options, rollout.environment, host)
    if rollout.engine == "vllm" and rollout.vllm_python:
        options = {"dtype": dtype, **routes, **rollout.vllm}
        return vllm_server(rollout.vllm_python, run.model.path, log, options, rollout.environment, host)
    if rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.engine = {rollout.engine!r} without rollout.urls: start the servers yourself, in their own "
            "environment, and give their urls"
        )
    # With a lag the requests of several steps overlap, and a run is not bitwise repeatable in any case.
    batching = "continuous" if rollout.max_lag else "request"
    options = ["--dtype", dtype, "--weight-version", "0", "--batching", batching]
    return embedded_server(run.model.path, log, options, host, environment=rollout.environment)
