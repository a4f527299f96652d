"""How a failing rank tells the process that started it, so that one message is shown and not one for each rank."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from megatron_rl.errors import MegatronRLError

REPORTS = "MEGATRON_RL_REPORTS"
"""Number of the file descriptor, a pipe to the process that started the ranks, on which a rank tells what is wrong."""

LONGEST_TEXT = 30_000
"""Characters of a report: less than a pipe holds, so that telling never waits."""

LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class RankFailure:
    """What ended a rank: a message for its user, or the traceback of what nobody expected."""

    expected: bool
    text: str

    @property
    def last_line(self) -> str:
        """The exception and its message."""
        return self.text.strip().rpartition("\n")[2]


@contextmanager
def reporting_failure() -> Iterator[None]:
    """Tell of an exception that leaves the block, then wait to be ended.

    A rank that left at once would break the connections of the others, and each would fail with an error of its own.
    """
    try:
        yield
    except Exception as error:
        if REPORTS in os.environ:
            _tell(error, int(os.environ[REPORTS]))
        raise


def _tell(error: Exception, descriptor: int) -> None:
    expected = isinstance(error, MegatronRLError)
    text = str(error) if expected else "".join(traceback.format_exception(error))
    os.write(descriptor, json.dumps(asdict(RankFailure(expected, text[-LONGEST_TEXT:]))).encode() + b"\n")
    time.sleep(LONGEST_WAIT_SECONDS)


def read_failure(descriptor: int) -> RankFailure | None:
    """Return what a rank has told on its pipe, None if nothing; the descriptor does not block."""
    try:
        message = os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return None
    return RankFailure(**json.loads(message)) if message else None
