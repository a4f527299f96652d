"""Files and folders that appear complete or not at all, even if the writing process is killed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def replace_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write a text file atomically: readers see the old content or the new content, never a part.

    Args:
        path: the file to replace or create; its folder must exist.
        text: the new content.
        mode: permissions, set before the content is written; None: those of a new file.
    """
    with replaced(path) as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(text.encode())


@contextmanager
def replaced(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces ``path`` when the block ends; an exception leaves ``path`` unchanged.

    Args:
        path: the file to replace or create; its folder must exist.
        durable: flush the content to disk before the file gets its name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        if durable:
            flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file, or the list of names in a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_folder(final: Path) -> Path:
    """Return an empty temporary folder next to ``final``; fill it, then call ``commit_folder``."""
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit_folder(temporary: Path, final: Path) -> None:
    """Flush a filled folder to disk and rename it to ``final``; an existing ``final`` is deleted first."""
    for path in temporary.iterdir():
        flush_to_disk(path)
    flush_to_disk(temporary)
    if final.exists():
        remove_folder(final)
    temporary.rename(final)
    flush_to_disk(final.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder; an interrupted deletion leaves a hidden name that no reader takes for the folder."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clear_leftovers(parent: Path) -> None:
    """Delete the temporary folders that interrupted calls of ``begin_folder`` and ``remove_folder`` left behind."""
    for pattern in (".*.part", ".*.old"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)
