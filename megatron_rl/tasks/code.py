"""The verifier ``code``: runs the program in a response against tests, in a sandbox. Needs ``reward.allow_code``.

The answer of a prompt is JSON, one of

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}    one run per input; the output is compared, ignoring white space
    {"asserts": "assert add(1, 2) == 3"}          executed after the program, in the same namespace

A program in the sandbox can still read the files that this user can read and use up its time limit. It has no way to
send anything out.
"""

import json
import math
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.tasks import Reward
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks import sandbox
from megatron_rl.tasks.base import Verdict

MEMORY_BYTES = 1 << 29
"""Limit of the address space of a program; the Python interpreter takes about 30 MB of it."""

TIME_SHARE = 0.8
"""Share of ``reward.seconds`` for all tests of a response. A program that takes longer is wrong, not unverified."""

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class ProgramResult:
    """Output of a program, and how it ended."""

    stdout: str
    failure: str
    """Empty if the program ended without an error."""


def extract_program(text: str) -> str:
    """Return the last fenced code block of a response, or the whole text if there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


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
    with tempfile.TemporaryDirectory(prefix="megatron-rl-code-") as name:
        folder = Path(name)
        for file, text in (("program.py", program), ("tests.py", tests), ("stdin", stdin)):
            (folder / file).write_text(text, encoding="utf-8", errors="replace")
        limits = [str(math.ceil(seconds)), str(MEMORY_BYTES)]
        command = [sys.executable, "-I", "-S", sandbox.__file__, "program.py", "tests.py", nonce, *limits]
        with (folder / "stdin").open("rb") as source, (folder / "stdout").open("wb") as output:
            child = subprocess.Popen(
                command, stdin=source, stdout=output, stderr=subprocess.DEVNULL, cwd=folder, env={}, close_fds=True
            )
            try:
                child.wait(seconds)
                failure = f"ended with {child.returncode}" if child.returncode else ""
            except subprocess.TimeoutExpired:
                failure = f"took longer than {seconds:.1f} s"
            finally:
                child.kill()
                child.wait()
        if child.returncode == sandbox.NOT_SANDBOXED:
            raise DataError("no seccomp filter on this machine: the verifier code does not run programs without one")
        return ProgramResult((folder / "stdout").read_text(encoding="utf-8", errors="replace"), failure)


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
import os, socket, threading
thread, file, signal = threading.Thread(target=int).start, lambda: open("made", "w"), lambda: os.kill(os.getppid(), 0)
for attempt in (socket.socket, os.fork, thread, file, signal):
    try:
        attempt()
    except (OSError, RuntimeError):
        continue
    print("got through")
print("locked")
"""


def check_sandbox() -> Iterator[str]:
    """Yield why the sandbox cannot be used on this machine. The check runs a program that tries to escape from it."""
    try:
        result = run_sandboxed(_ESCAPE_ATTEMPTS, "", 10.0)
    except DataError as error:
        yield str(error)
        return
    if result.failure or result.stdout.strip() != "locked":
        yield f"the sandbox of the verifier code fails on this machine: {result.failure or result.stdout.strip()!r}"
