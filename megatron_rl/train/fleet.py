"""The fleet that a configuration asks for: servers of our own, or running ones, and the carrier of weights to them."""

from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.members import Patience
from megatron_rl.rollout.process import ServerProcess, embedded_server
from megatron_rl.rollout.sglang import sglang_server
from megatron_rl.weights.disk import DiskCarrier
from megatron_rl.weights.protocol import Carrier
from megatron_rl.weights.tensor import TensorCarrier


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
    servers = list(rollout.urls) or [_server(run, number) for number in range(rollout.servers)]
    return Fleet(servers, _carrier(run), patience)


def _server(run: Run, number: int) -> ServerProcess:
    rollout, dtype = run.rollout, run.model.dtype
    log = Path(run.log.path) / "servers" / f"server_{number}.log"
    if rollout.engine == "sglang" and rollout.sglang_python:
        options = {"dtype": dtype, **rollout.sglang}
        return sglang_server(rollout.sglang_python, run.model.path, log, options, rollout.environment)
    if rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.engine = {rollout.engine!r} without rollout.urls: start the servers yourself, in their own "
            "environment, and give their urls"
        )
    options = ["--dtype", dtype, "--weight-version", "0"]
    return embedded_server(run.model.path, log, options, environment=rollout.environment)


def _carrier(run: Run) -> Carrier:
    if run.weights.carrier == "disk":
        return DiskCarrier(run.weights.bucket_bytes, Path(run.log.path) / "weights", Path(run.model.path))
    return TensorCarrier(run.weights.bucket_bytes)
