"""TCP ports of this machine."""

import socket

from megatron_rl.errors import RolloutError


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of ``host`` that no process listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def reserve_port(host: str, port: int) -> socket.socket:
    """Return a socket that keeps the system from giving the port to another process, until it is closed.

    A server that sets SO_REUSEADDR, as HTTP servers do, can listen on the port all the same.

    Raises:
        RolloutError: the port is in use, or ``host`` is not an address of this machine.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind((host, port))
    except OSError as error:
        reservation.close()
        raise RolloutError(f"cannot start a server on {host}:{port}: {error.strerror}; choose another port") from error
    return reservation


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on the port.

    Raises:
        RolloutError: the port is in use, or ``host`` is not an address of this machine.
    """
    reserve_port(host, port).close()
