"""``python -I -S sandbox.py PROGRAM TESTS NONCE CPU_SECONDS MEMORY_BYTES``: locks this process up, then runs a program.

Standard library only, and nothing of this package: it runs with an empty environment. After the lock there is no new
process or thread, no socket, no file that can be written or made, no signal to others: system calls are allowed by a
list, all others fail with EPERM. Without that lock the program is not run.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

NO_LOCK = 97
"""Exit code where the kernel has no seccomp filter, or this machine's system calls are not listed."""

MAX_FILE_BYTES = 1 << 20
"""Of what the program prints."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_CALL, _ARCHITECTURE, _FLAGS = 0, 4, 16 + 2 * 8  # offsets in struct seccomp_data; flags are openat's third argument
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last is O_TMPFILE

# What a Python program needs that computes, reads and prints. By kernel: (audit architecture, openat, the others).
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
    """Bound what the process may use; die with the parent."""
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


def lock() -> bool:
    """Allow only the listed system calls from here on; return whether the kernel agreed."""
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
    """Run the program, then the tests in its names, then print the nonce, which says that all of it ended well."""
    program, tests, nonce, cpu_seconds, memory_bytes = sys.argv[1:]
    with open(program, encoding="utf-8") as file:
        source = file.read()
    with open(tests, encoding="utf-8") as file:
        checks = file.read()
    limit(int(cpu_seconds), int(memory_bytes))
    if not lock():
        os._exit(NO_LOCK)
    sys.argv[1:] = []
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "program.py", "exec"), names)
    if checks:
        exec(compile(checks, "tests.py", "exec"), names)
        sys.stdout.write(nonce)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
