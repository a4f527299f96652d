"""Child processes that end with their parent, even if the parent is killed with SIGKILL.

Linux sends a chosen signal to a child when the thread that started it ends (``prctl(PR_SET_PDEATHSIG)``). The setting
survives ``exec``. On other systems the functions below do nothing.

Run as a script, ``python child_process.py PARENT_PID COMMAND...`` makes that setting for itself and then becomes the
command. It imports the standard library only, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def end_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Make memory, environment and open files of this process unreadable for other processes of the same user."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """Return ``command`` wrapped so that its process ends with the calling process; start it from a lasting thread."""
    return [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), *command]


def main() -> None:
    """Bind this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    end_with_parent()
    if os.getppid() != parent:  # the parent ended before the setting was made
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
