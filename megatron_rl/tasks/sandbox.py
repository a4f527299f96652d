"""``python -I -S sandbox.py PROGRAM TESTS NONCE CPU_SECONDS MEMORY_BYTES``: runs a program in a restricted process.

Uses the standard library only, because it runs with an empty environment. A seccomp filter allows a list of system
calls; all others fail with EPERM. The program cannot start processes or threads, open sockets, create or write files,
or signal other processes. If the filter cannot be installed, the program is not run.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

NOT_SANDBOXED = 97
"""Exit code if the kernel has no seccomp filter, or the architecture of this machine is not supported."""

MAX_FILE_BYTES = 1 << 20
"""Limit of the output of the program."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_CALL, _ARCHITECTURE, _FLAGS = 0, 4, 16 + 2 * 8  # offsets in struct seccomp_data; flags are openat's third argument
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last is O_TMPFILE

# System calls of Python programs that compute, read and print, as (audit architecture, openat, other calls).
_CALLS = {
    "x86_64": (
        0xC000003E,
        257,
        (
            *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 39, 60, 63),
            *(72, 79, 89, 96, 98, 99, 100, 102, 104, 107, 108, 110, 131, 186, 201, 202, 204, 217, 221, 228, 229, 230),
            *(231, 262, 267, 269, 270, 271, 273, 318, 332, 334, 439),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        56,
        (
            *(17, 23, 25, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 98, 99, 101, 113, 114, 115),
            *(123, 124, 132, 134, 135, 139, 153, 160, 165, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215),
            *(216, 222, 223, 226, 233, 278, 291, 293, 439),
        ),
    ),
}


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Set the resource limits of this process, and have it killed when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    bounds = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


def install_filter() -> bool:
    """Install the seccomp filter; return whether the kernel accepted it."""
    if platform.machine() not in _CALLS:
        return False
    architecture, openat, calls = _CALLS[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL),
        (_EQUAL, 0, 4, openat),
        (_LOAD, 0, 0, _FLAGS),
        (_ANY_BIT, 0, 1, _WRITES),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for call in calls:
        program += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0) == 0


def main() -> None:
    """Run the program, then the tests in its namespace, then print the nonce, which shows that both succeeded."""
    program, tests, nonce, cpu_seconds, memory_bytes = sys.argv[1:]
    with open(program, encoding="utf-8") as file:
        source = file.read()
    with open(tests, encoding="utf-8") as file:
        checks = file.read()
    limit(int(cpu_seconds), int(memory_bytes))
    if not install_filter():
        os._exit(NOT_SANDBOXED)
    sys.argv[1:] = []
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "program.py", "exec"), names)
    if checks:
        exec(compile(checks, "tests.py", "exec"), names)
        sys.stdout.write(nonce)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
