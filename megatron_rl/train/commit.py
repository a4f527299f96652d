"""Folders that appear whole or not at all, whatever ends the process that writes them."""

import shutil
from pathlib import Path

from megatron_rl.data.files import flush


def begin(final: Path) -> Path:
    """Return an empty folder to write into, beside its final place."""
    beside = final.with_name(f".{final.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def commit(beside: Path, final: Path) -> None:
    """Move a written folder to its final place once every byte of it is on the disk; what was there goes."""
    for path in beside.iterdir():
        flush(path)
    flush(beside)
    if final.exists():
        drop(final)
    beside.rename(final)
    flush(final.parent)


def drop(folder: Path) -> None:
    """Delete a folder; if that is interrupted, what is left does not look like the folder."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clear_leftovers(parent: Path) -> None:
    """Delete what interrupted calls of ``begin`` and ``drop`` left."""
    for pattern in (".*.part", ".*.old"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)
