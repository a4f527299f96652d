"""The addresses of a run's servers: files in a folder, or lines of one file; read again and again during the run.

A server joins the fleet when its address appears, and leaves it when the address is gone.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import RolloutError
from megatron_rl.util.atomic import replace_text

END = "end"
"""Name of the file in a registry that says that the run has ended."""

UNCHECKED = "unchecked"
"""Name of the file in a registry that says that its servers have not passed the preflight yet."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Registry:
    """The addresses in a folder, one file ``server_N.json`` per server, or in a file, one per line.

    In a file, empty lines and lines that start with # have no address.
    """

    path: Path

    def urls(self) -> list[str]:
        """Return the addresses; none if the path does not exist.

        Raises:
            RolloutError: an address cannot be read.
        """
        return self._read() if self.path.exists() else []

    def changed_urls(self) -> list[str] | None:
        """Return the addresses; None if they cannot be read now, as during a failure of the file system."""
        try:
            return self._read()
        except RolloutError:
            return None

    def wait(self, count: int, timeout_seconds: float, *, checked: bool = True) -> list[str]:
        """Wait until ``count`` servers have registered, and passed the preflight if it runs; return their addresses.

        Raises:
            RolloutError: not all servers have registered in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while len(urls := self.urls()) < count or (checked and (self.path / UNCHECKED).exists()):
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"{len(urls)} of {count} servers (rollout.servers) have registered in {self.path}"
                    f" (rollout.registry) within {timeout_seconds:g} s{self._missing(count)}; see their logs; raise"
                    " rollout.start_timeout_seconds if they are slow"
                )
            time.sleep(_POLL_SECONDS)
        return urls

    def add(self, number: int, url: str) -> None:
        """Register the address of server ``number`` in the folder."""
        replace_text(self.path / _file_name(number), json.dumps({"url": url}) + "\n")

    def remove(self, number: int) -> None:
        """Remove server ``number`` from the folder."""
        (self.path / _file_name(number)).unlink(missing_ok=True)

    def _read(self) -> list[str]:
        try:
            if self.path.is_dir():
                files = sorted(self.path.glob(_file_name("*")), key=lambda path: (len(path.name), path.name))
                urls = [str(json.loads(path.read_text())["url"]) for path in files]
            else:
                lines = [line.strip() for line in self.path.read_text().splitlines()]
                urls = [line for line in lines if line and not line.startswith("#")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RolloutError(
                f"cannot read the addresses of servers in {self.path} (rollout.registry): {error}"
            ) from error
        return list(dict.fromkeys(url.rstrip("/") for url in urls))

    def _missing(self, count: int) -> str:
        if not self.path.is_dir():
            return ""
        missing = [str(number) for number in range(count) if not (self.path / _file_name(number)).exists()]
        unchecked = ", and the preflight has not passed" if (self.path / UNCHECKED).exists() else ""
        return f", {', '.join(missing) or 'none'} have not{unchecked}"


def _file_name(number: int | str) -> str:
    return f"server_{number}.json"
