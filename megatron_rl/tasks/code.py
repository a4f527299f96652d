"""The verifier ``code``: runs the program in a response against tests, in a sandbox. Needs ``reward.allow_code``.

The answer of a prompt is JSON, one of

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}    one run per input; the output is compared, ignoring white space
    {"asserts": "assert add(1, 2) == 3"}          executed after the program, in the same namespace

The sandbox allows the system calls and files of ``sandbox.py``. Where bubblewrap is installed and works
(https://github.com/containers/bubblewrap), it also has user, process, mount and network namespaces of its own. A
program can use up its time limit; it cannot send anything out.
"""

import functools
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.tasks import Reward
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks import sandbox
from megatron_rl.tasks.base import Verdict
from megatron_rl.tasks.fences import code_blocks

MEMORY_BYTES = 1 << 29
"""Limit of the address space of a program; the Python interpreter takes about 30 MB of it."""

TIME_SHARE = 0.8
"""Share of ``reward.seconds`` for all tests of a response. A program that takes longer is wrong, not unverified."""


@dataclass(frozen=True)
class ProgramResult:
    """Output of a program, and how it ended."""

    stdout: str
    failure: str
    """Empty if the program ended without an error."""


def extract_program(text: str) -> str:
    """Return the last fenced block of a response that is or may be Python, or the whole text if there is none."""
    blocks = [block.text for block in code_blocks(text) if block.is_python]
    return blocks[-1] if blocks else text.replace("\r\n", "\n")


def run_sandboxed(program: str, stdin: str, seconds: float, tests: str = "", nonce: str = "") -> ProgramResult:
    """Run a program without network access, writable files or child processes, and return its output.

    Args:
        program: Python source.
        stdin: text that the program can read.
        seconds: limit of wall-clock and CPU time.
        tests: Python source that is executed after the program, in the same namespace.
        nonce: text that is printed after ``tests`` succeeded.

    Raises:
        DataError: this machine has no seccomp filter; the program was not run.
    """
    return _run_sandboxed(bubblewrap(), program, stdin, seconds, tests, nonce)


def _run_sandboxed(
    bwrap: str | None, program: str, stdin: str, seconds: float, tests: str = "", nonce: str = ""
) -> ProgramResult:
    with tempfile.TemporaryDirectory(prefix="megatron-rl-code-") as name, ExitStack() as stack:
        folder = Path(name)
        for file, text in (("program.py", program), ("stdin", stdin)):
            (folder / file).write_text(text, encoding="utf-8", errors="replace", newline="")
        source = stack.enter_context((folder / "stdin").open("rb"))
        output = stack.enter_context(tempfile.TemporaryFile())
        status = stack.enter_context(tempfile.TemporaryFile())
        checks = stack.enter_context(tempfile.TemporaryFile())
        checks.write(f"{nonce}\n{tests}".encode(errors="replace"))
        checks.seek(0)
        limits = [str(math.ceil(seconds)), str(MEMORY_BYTES)]
        descriptors = [str(checks.fileno() if tests else -1), str(status.fileno())]
        python = [os.path.realpath(sys.executable), "-I", "-S", os.path.realpath(sandbox.__file__), "program.py"]
        child = subprocess.Popen(
            [*_namespaces(bwrap, folder), *python, *descriptors, *limits],
            stdin=source,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=(status.fileno(), *((checks.fileno(),) if tests else ())),
        )
        timed_out = False
        try:
            child.wait(seconds)
            failure = f"ended with {child.returncode}" if child.returncode else ""
        except subprocess.TimeoutExpired:
            failure, timed_out = f"took longer than {seconds:.1f} s", True
        finally:
            child.kill()
            child.wait()
        # The program cannot write this byte nor take it back: its descriptor is closed before the program begins.
        if not os.fstat(status.fileno()).st_size and not timed_out:
            raise DataError("no seccomp filter on this machine: the verifier code does not run programs without one")
        output.seek(0)
        return ProgramResult(output.read().decode(errors="replace"), failure)


def _namespaces(bwrap: str | None, folder: Path) -> list[str]:
    """Return the start of a command that runs in new namespaces, with Python and ``folder`` as its only files."""
    if bwrap is None:
        return []
    paths = [*sandbox.readable_paths(), os.path.realpath(sys.executable), os.path.realpath(sandbox.__file__)]
    paths = [path for path in paths if not path.startswith("/dev/")]
    binds = [word for path in (*paths, str(folder)) for word in ("--ro-bind", path, path)]
    options = "--unshare-all --die-with-parent --new-session --cap-drop ALL --uid 65534 --gid 65534 --clearenv"
    return [bwrap, *options.split(), "--dev", "/dev", "--proc", "/proc", *binds, "--chdir", str(folder), "--"]


@functools.cache
def bubblewrap() -> str | None:
    """Return the path of bubblewrap; None if it is not installed or cannot make namespaces on this machine."""
    path = shutil.which("bwrap")
    if path is None:
        return None
    try:
        works = _run_sandboxed(path, "print(1)", "", 10.0) == ProgramResult("1\n", "")
    except DataError:
        works = False
    return path if works else None


class CodeVerifier:
    """Gives score 1 if all tests in the answer pass, else 0."""

    def __init__(self, reward: Reward) -> None:
        self.seconds = reward.seconds * TIME_SHARE

    def __call__(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the verdict on a response.

        Raises:
            DataError: the answer of the prompt has no tests.
        """
        program, deadline = extract_program(response.answer_text), time.monotonic() + self.seconds
        for stdin, expected, asserts in parse_tests(prompt.answer):
            nonce = secrets.token_hex(16) if asserts else ""
            left = max(deadline - time.monotonic(), 0.01)
            result = run_sandboxed(program, stdin, left, asserts, nonce)
            if result.failure:
                return Verdict(0.0, False, result.failure)
            if asserts and not result.stdout.endswith(nonce):
                return Verdict(0.0, False, "ended before its tests")
            if not asserts and result.stdout.split() != expected.split():
                return Verdict(0.0, False, f"printed {result.stdout[:80]!r} instead of {expected[:80]!r}")
        return Verdict(1.0, True)


def parse_tests(answer: str) -> Iterator[tuple[str, str, str]]:
    """Yield (stdin, expected output, asserts) for each test."""
    try:
        tests = json.loads(answer)
    except ValueError as error:
        raise DataError(f"not JSON: {answer[:80]!r} (the answer of a prompt with the verifier code)") from error
    match tests:
        case {"inputs": [*inputs], "outputs": [*outputs]} if len(inputs) == len(outputs) > 0:
            yield from ((str(stdin), str(expected), "") for stdin, expected in zip(inputs, outputs, strict=True))
        case {"asserts": str(asserts)} if asserts.strip():
            yield "", "", asserts
        case _:
            raise DataError(
                f"no tests in {answer[:80]!r} (the verifier code); write inputs and outputs of equal length, or asserts"
            )


_ESCAPE_ATTEMPTS = """
import fcntl, os, socket, threading

def environments():
    own = [str(os.getpid()), "self", "thread-self"]
    others = [name for name in os.listdir("/proc") if name.isdigit() and name not in own]
    read = [name for name in others if readable(f"/proc/{name}/environ") or readable(f"/proc/{name}/mem")]
    if not read:
        raise OSError

def readable(path):
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False

attempts = {
    "open a socket": socket.socket,
    "start a process": os.fork,
    "start a thread": threading.Thread(target=int).start,
    "write a file": lambda: open("made", "w"),
    "send a signal": lambda: os.kill(os.getppid(), 0),
    "have a signal sent": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid()),
    "read the memory of other processes": environments,
}
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, RuntimeError):
        continue
    print(f"a program can {name}")
print("locked")
"""


def check_sandbox() -> Iterator[str]:
    """Yield why the sandbox cannot be used on this machine. The check runs a program that tries to escape from it."""
    try:
        result = run_sandboxed(_ESCAPE_ATTEMPTS, "", 10.0)
    except DataError as error:
        yield str(error)
        return
    found = "; ".join(result.stdout.splitlines())
    if result.failure or found != "locked":
        yield (
            f"the sandbox of the verifier code does not isolate on this machine: {result.failure or found}; install"
            " bubblewrap (bwrap), allow user namespaces, or use a kernel with Landlock (5.13 or later)"
        )
