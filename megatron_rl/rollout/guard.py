"""``python guard.py PARENT COMMAND...``: becomes the command, and dies when its parent dies.

Linux ends the process with the thread that started it (PR_SET_PDEATHSIG survives exec), however that came to its end:
no server outlives a trainer that was killed. Elsewhere the command just runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind this process to its parent, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the binding held
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
