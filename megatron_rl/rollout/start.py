"""A run's fleet, from its configuration."""

import logging
import math
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.members import Patience
from megatron_rl.rollout.process import ServerProcess, embedded_server
from megatron_rl.rollout.sync import Carrier

log = logging.getLogger(__name__)


def open_fleet(run: Run, carrier: Carrier) -> Fleet:
    """Start the servers of the run, or connect to those it names; return when all are healthy.

    The servers that are started serve the weights of ``model.path`` as version 0.
    """
    rollout = run.rollout
    patience = Patience(
        request_timeout_seconds=rollout.request_timeout_seconds,
        start_timeout_seconds=rollout.start_timeout_seconds,
        attempts=rollout.attempts,
    )
    servers = list(rollout.urls) or [_server(run, index) for index in range(rollout.servers)]
    if not servers:
        raise ConfigError("no rollout server: rollout.servers is 0 and rollout.urls is empty; set one of them")
    return Fleet(servers, carrier, patience, requests_per_server=2 if rollout.engine == "embedded" else math.inf)


def _server(run: Run, index: int) -> ServerProcess:
    if run.rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.engine is {run.rollout.engine!r} and rollout.urls is empty: only embedded servers are started "
            "by a run; start the servers and set rollout.urls, or write rollout.engine = 'embedded'"
        )
    folder = Path(run.log.path) / "servers"
    options = ["--weight-version", "0", "--dtype", run.model.dtype, "--seed", str(run.train.seed)]
    return embedded_server(run.model.path, folder / f"server-{index}.log", options)
