"""Exit codes of the commands of this package, and the wrapper that turns errors into them.

The Slurm job script requeues a job that ends with ``HUNG``.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from megatron_rl.errors import MegatronRLError

USER_ERROR = 2
"""A configuration, file, server or training error; stderr has one message."""
HUNG = 75
"""The watchdog ended a run that made no progress, or the rollout controller was killed."""
STOPPED = 130
"""The run was asked to stop and can be resumed; or the command was interrupted."""


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    A ``MegatronRLError`` becomes one message on stderr and ``USER_ERROR``, an interrupt becomes ``STOPPED``.
    """
    try:
        return command()
    except MegatronRLError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        return STOPPED


def interrupt_on_sigterm() -> None:
    """Raise ``KeyboardInterrupt`` on SIGTERM, as on SIGINT, so that child processes and files are cleaned up."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
