"""Hosts with links of equal speed: network namespaces on a bridge, shaped by token buckets; needs root."""

import os
import subprocess
from collections.abc import Sequence
from typing import Literal

BURST_BYTES = 64 << 10
LATENCY = "100ms"
"""How long the token bucket may hold a packet before it is dropped."""
Shaped = Literal["sent", "both"]


class LinkHosts:
    """A context manager for hosts 10.78.0.1, 10.78.0.2, ...

    Args:
        count: number of hosts.
        megabits: speed of every link, in Mbit/s.
        shaped: whether only what a host sends is limited, or also what it receives.
    """

    def __init__(self, count: int, megabits: float, shaped: Shaped) -> None:
        self.count, self.megabits, self.shaped = count, megabits, shaped
        self._prefix = f"lh{os.getpid() % 100000}"

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.78.0.{host + 1}"

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command on a host."""
        return ["nsenter", f"--net=/var/run/netns/{self._prefix}n{host}", *command]

    def __enter__(self) -> "LinkHosts":
        try:
            self._run("ip", "link", "add", f"{self._prefix}b", "type", "bridge")
            self._run("ip", "link", "set", f"{self._prefix}b", "up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(self.count):
            subprocess.run(["ip", "netns", "del", f"{self._prefix}n{host}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self._prefix}b"], check=False, capture_output=True)

    def _add(self, host: int) -> None:
        space, outer = f"{self._prefix}n{host}", f"{self._prefix}v{host}"
        self._run("ip", "netns", "add", space)
        self._run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        self._run("ip", "link", "set", outer, "master", f"{self._prefix}b", "up")
        for command in (
            ["link", "set", "lo", "up"],
            ["link", "set", "eth0", "up"],
            ["addr", "add", f"{self.address(host)}/24", "dev", "eth0"],
        ):
            self._run("ip", "-n", space, *command)
        bucket = ["root", "tbf", "rate", f"{self.megabits:g}mbit", "burst", str(BURST_BYTES), "latency", LATENCY]
        self._run(*self.on(host, ["tc", "qdisc", "add", "dev", "eth0", *bucket]))
        if self.shaped == "both":
            self._run("tc", "qdisc", "add", "dev", outer, *bucket)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
