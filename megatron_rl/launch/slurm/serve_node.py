"""One server of a Slurm job: started, registered, restarted when it dies, and ended with the job.

Run by the job script as ``python -m megatron_rl.launch.slurm.serve_node --registry FOLDER CONFIG...``. Files:

RUN/fleet/START/server_0.json   {"url": "http://..."}, before the server is healthy; removed if it stops before "end"
RUN/fleet/START/unchecked       removed after all servers passed ``fleet_check``; the trainer waits for that
RUN/fleet/START/end             written when the trainer has ended; the servers then exit
"""

import argparse
import logging
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.schema import Run, load_run
from megatron_rl.distributed.mesh import slurm_address, slurm_task_index
from megatron_rl.errors import ConfigError, RolloutError
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.fleet.registry import END, Registry
from megatron_rl.fleet.servers import server_of
from megatron_rl.util.exit_codes import interrupt_on_sigterm, run_command

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FIRST_RESTART_SECONDS, MAX_RESTART_SECONDS = 1.0, 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one server until the job ends; return the exit code."""
    parser = argparse.ArgumentParser(prog="serve_node", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE")
    parser.add_argument("--registry", type=Path, required=True, metavar="FOLDER", help="folder for its address")
    parser.add_argument("--host", help="address to listen on (default: the address of this node)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    interrupt_on_sigterm()
    return run_command("serve_node", lambda: keep_server(load_run(options.config).run, options.registry, options.host))


def keep_server(run: Run, registry: Path, host: str | None = None) -> int:
    """Run a server until the job ends; return the exit code.

    Args:
        run: the configuration; its engine and model are served.
        registry: folder in which the trainer looks for addresses.
        host: address to listen on; None: the address of this node.
    """
    number = slurm_task_index()
    server = server_of(run, number, host or node_address())
    registry.mkdir(parents=True, exist_ok=True)
    delay = FIRST_RESTART_SECONDS
    try:
        server.start()
        Registry(registry).add(number, server.url)
        while not (registry / END).exists():
            time.sleep(POLL_SECONDS)
            if server.exit_status is not None:
                log.warning("the server exited with status %d; restarting it in %g s", server.exit_status, delay)
                time.sleep(delay)
                delay = min(2 * delay, MAX_RESTART_SECONDS)
                _restart(server)
    except KeyboardInterrupt:
        log.info("stop requested")
    finally:
        if not (registry / END).exists():
            Registry(registry).remove(number)  # the trainer sends its requests to other servers
        server.stop()
    return 0


def _restart(server: ServerProcess) -> None:
    """Start a server again at its address, which the trainer knows; if its port is in use, the caller tries again."""
    try:
        server.start()
    except RolloutError:
        log.warning("port %d is still in use, perhaps by a child of the old server; trying again", server.port)


def node_address() -> str:
    """Return the address of this node: the one that Slurm uses, else that of its host name.

    Raises:
        ConfigError: the host name has no address.
    """
    if address := slurm_address():
        return address
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ConfigError(
            f"the host name of this node, {socket.gethostname()}, has no address: {error}; give --host"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
