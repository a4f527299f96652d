"""The addresses of verifier hosts: files in a folder, or lines of one file; read again and again during the run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import DataError
from megatron_rl.util.atomic import replace_text

Address = tuple[str, int]


def read_hosts(path: Path) -> list[Address]:
    """Return the addresses in a folder of files ``verifier_*.json``, or in a file with one ``host:port`` per line.

    Raises:
        DataError: an address is not ``host:port``, or cannot be read.
    """
    try:
        words: list[str] = []
        if path.is_dir():
            words = [str(json.loads(file.read_text())["address"]) for file in sorted(path.glob("verifier_*.json"))]
        elif path.exists():
            lines = [line.strip() for line in path.read_text().splitlines()]
            words = [line for line in lines if line and not line.startswith("#")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the addresses of verifier hosts in {path} (reward.registry): {error}") from error
    return list(dict.fromkeys(_parsed(word, path) for word in words))


@contextlib.contextmanager
def add_host(folder: Path, address: str) -> Iterator[None]:
    """Keep the address of a host in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"verifier_{address.replace(':', '_')}.json"
    replace_text(file, json.dumps({"address": address}) + "\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _parsed(word: str, path: Path) -> Address:
    host, _, port = word.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise DataError(f"{word!r} in {path} (reward.registry) is no address; write host:port")
    return host.strip("[]"), int(port)
