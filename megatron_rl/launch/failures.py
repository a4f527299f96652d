"""How a failing rank reports its error to the process that started the ranks, which then shows one message."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from megatron_rl.errors import MegatronRLError

REPORT_FD = "MEGATRON_RL_REPORTS"
"""Environment variable with the file descriptor of the pipe on which a rank reports its failure."""

MAX_REPORT_CHARACTERS = 30_000
"""Smaller than a pipe's buffer, so that writing a report never blocks."""

MAX_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class RankFailure:
    """The error that ended a rank.

    Attributes:
        expected: the error is a ``MegatronRLError``, whose message is meant for users.
        text: the message of an expected error, otherwise the traceback.
    """

    expected: bool
    text: str

    @property
    def last_line(self) -> str:
        """The last line of the text: of a traceback, the exception and its message."""
        return self.text.strip().rpartition("\n")[2]


@contextmanager
def reporting_failure() -> Iterator[None]:
    """Report an exception that leaves the block to the parent process, then wait to be terminated.

    A rank that exited at once would break the connections of the others, and each of them would fail too.
    """
    try:
        yield
    except Exception as error:
        if REPORT_FD in os.environ:
            _report(error, int(os.environ[REPORT_FD]))
        raise


def _report(error: Exception, descriptor: int) -> None:
    expected = isinstance(error, MegatronRLError)
    text = str(error) if expected else "".join(traceback.format_exception(error))
    failure = RankFailure(expected, text[-MAX_REPORT_CHARACTERS:])
    os.write(descriptor, json.dumps(asdict(failure)).encode() + b"\n")
    time.sleep(MAX_WAIT_SECONDS)


def read_failure(descriptor: int) -> RankFailure | None:
    """Return the failure that a rank reported on its non-blocking pipe, or None."""
    try:
        message = os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return None
    return RankFailure(**json.loads(message)) if message else None
