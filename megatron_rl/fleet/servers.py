"""The servers of a run: running ones, registered ones, or processes that the run starts."""

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.fleet.registry import Registry
from megatron_rl.fleet.sglang import sglang_server
from megatron_rl.fleet.vllm import vllm_server


def servers_of(run: Run) -> Sequence[str | ServerProcess]:
    """Return the urls of running servers, or server processes that are not started yet.

    Raises:
        ConfigError: the run cannot start servers of this engine.
        RolloutError: not all servers have registered in time.
    """
    rollout = run.rollout
    if rollout.registry:
        # They may be registered only once they are healthy, which may take start_timeout_seconds.
        return Registry(Path(rollout.registry)).wait(rollout.servers, 2 * rollout.start_timeout_seconds)
    return rollout.urls or [server_of(run, number) for number in range(rollout.servers)]


def server_of(run: Run, number: int, host: str = "127.0.0.1") -> ServerProcess:
    """Return a server of the configured engine that is not started yet.

    Raises:
        ConfigError: the run cannot start servers of this engine.
    """
    rollout, dtype = run.rollout, run.rollout.dtype or run.model.dtype
    folder = rollout.model_path or run.model.path
    log = Path(run.log.path) / "servers" / f"server_{number}.log"
    routes = {"enable_return_routed_experts": True} if rollout.routing_replay in ("report", "r3") else {}
    code = {"trust_remote_code": True} if run.model.trust_code else {}
    if rollout.engine == "sglang" and rollout.sglang_python:
        options = {"dtype": dtype, **routes, **code, **rollout.sglang}
        return sglang_server(rollout.sglang_python, folder, log, options, rollout.environment, host)
    if rollout.engine == "vllm" and rollout.vllm_python:
        options = {"dtype": dtype, **routes, **code, **rollout.vllm}
        return vllm_server(rollout.vllm_python, folder, log, options, rollout.environment, host)
    if rollout.engine != "embedded":
        raise ConfigError(
            f"rollout.engine = {rollout.engine!r} without rollout.urls: start the servers yourself, in their own "
            "environment, and give their urls"
        )
    # With a lag the requests of several steps overlap, and a run is not bitwise repeatable in any case.
    batching = "continuous" if rollout.max_lag else "request"
    options = ["--dtype", dtype, "--weight-version", "0", "--batching", batching]
    options += ["--dequantize"] if run.weights.encoding == "none" else []
    options += ["--trust-code"] if run.model.trust_code else []
    return embedded_server(folder, log, options, host, environment=rollout.environment)
