"""``python -I -S sandbox.py PROGRAM CHECKS_FD STATUS_FD CPU_SECONDS MEMORY_BYTES``: runs a program, confined.

Uses the standard library only, because it runs with an empty environment. The process gives up its capabilities, hides
all files except Python and the current folder (Landlock, where the kernel has it), and installs a seccomp filter that
allows a list of system calls; all others fail with EPERM. The program cannot start processes or threads, open sockets,
create or write files, or signal other processes. One byte on STATUS_FD says that all this was done. Without a filter
the program is not run.

Landlock: https://docs.kernel.org/userspace-api/landlock.html
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
import types

MAX_FILE_BYTES = 1 << 20
"""Limit of the output of the program."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 1, 22, 38, 2
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
# Offsets in struct seccomp_data: the flags are openat's third argument, the command is fcntl's second.
_CALL, _ARCHITECTURE, _COMMAND, _FLAGS = 0, 4, 16 + 1 * 8, 16 + 2 * 8
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate, flags; none of them chooses an owner of signals (F_SETOWN)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last is O_TMPFILE

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_LANDLOCK_VERSION = 1
_LANDLOCK_RIGHTS, _LANDLOCK_READ_FILE, _LANDLOCK_READ = 0x1FFF, 1 << 2, 1 << 0 | 1 << 2 | 1 << 3

# System calls of Python programs that compute, read and print, as (architecture, openat, fcntl, other calls).
_CALLS = {
    "x86_64": (
        0xC000003E,
        257,
        72,
        (
            *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 39, 60, 63),
            *(79, 89, 96, 98, 99, 100, 102, 104, 107, 108, 110, 131, 186, 201, 202, 204, 217, 221, 228, 229, 230),
            *(231, 262, 267, 269, 270, 271, 273, 318, 332, 334, 439),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        56,
        25,
        (
            *(17, 23, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 98, 99, 101, 113, 114, 115),
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


def drop_capabilities() -> None:
    """Give up all capabilities, so that root's processes have no rights over other processes."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    ctypes.CDLL(None).capset(header, nothing)


def readable_paths() -> list[str]:
    """Return the files and folders that a program of the standard library needs; other files are hidden."""
    python = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")]
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    devices = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return [path for path in dict.fromkeys([*python, *system, *devices]) if os.path.exists(path)]


def hide_files(folder: str) -> bool:
    """Restrict this process to reading ``folder`` and ``readable_paths``; return whether the kernel can do so."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < 1:
        return False
    # From version 6 on, the third field forbids signals to processes outside.
    attributes = struct.pack("QQQ", _LANDLOCK_RIGHTS, 0, 3)[: 24 if version >= 6 else 8]
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path in (folder, *readable_paths()):
        descriptor = os.open(path, os.O_PATH)
        rights = _LANDLOCK_READ if os.path.isdir(path) else _LANDLOCK_READ_FILE
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restricted = libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return restricted


def install_filter() -> bool:
    """Install the seccomp filter; return whether the kernel accepted it."""
    if platform.machine() not in _CALLS:
        return False
    architecture, openat, fcntl, calls = _CALLS[platform.machine()]
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
        (_EQUAL, 0, 2 * len(_FCNTL_COMMANDS) + 2, fcntl),
        (_LOAD, 0, 0, _COMMAND),
    ]
    for command in _FCNTL_COMMANDS:
        program += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _EPERM))
    for call in calls:
        program += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0) == 0


def define_site_names() -> None:
    """Define ``exit``, ``quit``, ``help`` and others, which Python defines unless it runs with ``-S``."""
    import _sitebuiltins
    import builtins

    names: dict[str, object] = {name: _sitebuiltins.Quitter(name, "the end of the input") for name in ("exit", "quit")}
    names |= {name: _sitebuiltins._Printer(name, "") for name in ("copyright", "credits", "license")}
    vars(builtins).update(names, help=_sitebuiltins._Helper())


def main() -> None:
    """Run the program as ``__main__``, then the tests in its namespace, then print the nonce: both succeeded."""
    program, checks_fd, status_fd, cpu_seconds, memory_bytes = sys.argv[1:]
    with open(program, encoding="utf-8") as file:
        source = file.read()
    limit(int(cpu_seconds), int(memory_bytes))
    hide_files(os.getcwd())
    drop_capabilities()
    if not install_filter():
        sys.exit("no seccomp filter")
    os.write(int(status_fd), b"1")
    os.close(int(status_fd))
    sys.argv[1:] = []
    define_site_names()
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = program
    sys.modules["__main__"] = module
    exec(compile(source, program, "exec", dont_inherit=True), module.__dict__)
    if int(checks_fd) >= 0:
        with os.fdopen(int(checks_fd), encoding="utf-8") as file:
            nonce, _, checks = file.read().partition("\n")
        exec(compile(checks, "tests.py", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.write(nonce)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
