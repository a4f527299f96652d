"""Stopping a run on request: after the current step, or at once while it waits for samples."""

from collections.abc import Callable
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class StopRequested(BaseException):
    """A stop was requested during an interruptible wait; no sample is lost."""


class StopSignal:
    """Whether a stop was requested. ``request`` is a signal handler for the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._waiting = False

    def request(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Request a stop; interrupts ``wait``."""
        self.requested = True
        if self._waiting:
            raise StopRequested

    def wait(self, call: Callable[[], T]) -> T:
        """Return the result of a blocking call.

        Raises:
            StopRequested: a stop was requested before or during the call.
        """
        self._waiting = True
        try:
            if self.requested:
                raise StopRequested
            return call()
        finally:
            self._waiting = False
