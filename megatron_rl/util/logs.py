"""The logger of the package: modules log to ``megatron_rl.MODULE``, and one handler per process shows the messages."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

LOGGER = logging.getLogger("megatron_rl")


def message_of(record: logging.LogRecord) -> str:
    """Return the text of a log record; warnings and errors start with their level."""
    level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
    return level + record.getMessage()


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes messages to stderr, each after a prefix such as ``megatron-rl train``."""

    def __init__(self, prefix: str) -> None:
        super().__init__(sys.stderr)
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a message."""
        return f"{self._prefix}: {message_of(record)}"


@contextmanager
def logging_to(handler: logging.Handler, level: int = logging.INFO) -> Iterator[None]:
    """Send the messages of this level and above to this handler alone inside a ``with`` block."""
    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False  # handlers of other packages would show messages twice
    try:
        yield
    finally:
        LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before
