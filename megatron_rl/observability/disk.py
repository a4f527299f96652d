"""The files of a run folder while it trains: a disk that cannot be written is one error, and no line is lost."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rl.errors import TrainingError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
"""Errors that only files have: full, over quota, read-only, too large, damaged, gone."""

FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR}
"""Errors that concern the run folder if the file is in it."""


class AppendedFile:
    """A file to which whole lines are appended, without a buffer that could fail at the end of the run.

    A text that can be written only in part is removed again, so the file ends with a whole line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, text: str) -> None:
        """Append a text.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        data = memoryview(text.encode("utf-8", "surrogatepass"))
        size = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to this file: its folder may have been deleted or moved."""
        try:
            found, opened = self.path.stat(), os.fstat(self._descriptor)
        except OSError:
            return False
        return (found.st_ino, found.st_dev) == (opened.st_ino, opened.st_dev)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of a disk, and of files in the run folder, into one error that says how to continue.

    Raises:
        TrainingError: the run folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        place = str(error.filename or folder)
        in_folder = Path(place).absolute().is_relative_to(folder.absolute())
        if error.errno in DISK_ERRORS or (error.errno in FILE_ERRORS and in_folder):
            raise TrainingError(unwritable(folder, f"{place}: {error.strerror}")) from error
        raise


def unwritable(folder: Path, why: str) -> str:
    """Return the message about a run folder that cannot be written."""
    return (
        f"the run folder {folder} (log.path) cannot be written: {why}; make space or correct it, then continue with the"
        " same command and train.resume=true: it repeats the steps after the newest checkpoint"
    )
