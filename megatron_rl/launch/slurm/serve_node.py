"""One server of a fleet on a node of its own: started, registered, started again when it dies, ended with the job.

RUN/fleet/START/server_0.json   {"url": "http://..."}, written before the server is healthy; its url never changes
RUN/fleet/START/asked/          the same files, for the trainer, once every server has answered (``roundtrip``)
RUN/fleet/START/end             the trainer has ended, and so do the servers
"""

import logging
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import task_number
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.servers import END, server_of, write_address

log = logging.getLogger(__name__)

NODES = "MEGATRON_RL_NODES"
"""``node=address`` of every node of the job; the job's script fills it in."""

LOOK_SECONDS = 0.5
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0


def keep_server(run: Run, registry: Path, host: str | None = None) -> int:
    """Run a server until the job ends; return the exit code.

    Args:
        run: the configuration; its engine and model are served.
        registry: folder that the trainer looks into.
        host: address to listen on; None: this node's.
    """
    number = task_number()
    server = server_of(run, number, host or node_address())
    signal.signal(signal.SIGTERM, _stop)
    registry.mkdir(parents=True, exist_ok=True)
    wait = FIRST_WAIT_SECONDS
    try:
        server.start()
        write_address(registry, number, server.url)
        while not (registry / END).exists():
            time.sleep(LOOK_SECONDS)
            if server.exit_status is not None:
                log.warning("the server ended with status %d; starting it again in %g s", server.exit_status, wait)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
                server.start()
    except KeyboardInterrupt:
        log.info("asked to end")
    finally:
        server.stop()
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def node_address() -> str:
    """Return the address of this node: as Slurm uses it, else that of its name.

    Raises:
        ConfigError: the name has no address.
    """
    node = os.environ.get("SLURMD_NODENAME", "")
    known = dict(pair.split("=", 1) for pair in os.environ.get(NODES, "").split())
    if node in known:
        return known[node]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ConfigError(
            f"the name of this node, {socket.gethostname()}, has no address: {error}; give --host"
        ) from error
