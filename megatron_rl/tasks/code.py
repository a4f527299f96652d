"""A verifier that runs what the model wrote: ``code``. An opt-in, ``reward.allow_code``.

The answer of a prompt is JSON, one of

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}    run once an input; what is printed is compared, space around it aside
    {"asserts": "assert add(1, 2) == 3"}          run after the program, in its names

What a program in the sandbox can still do: read what this user can read, and use up its time. It cannot tell anyone.
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
"""Of address space; a Python interpreter takes about 30 MB of it."""

TIME_SHARE = 0.8
"""Share of ``reward.seconds`` that a program gets for all its tests; one that needs more is wrong, not unverified."""

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    printed: str
    failure: str
    """Empty if it ended by itself without an error."""


def extract_program(text: str) -> str:
    """Return the last fenced block of a response, or all of it."""
    found = _FENCE.findall(text)
    return found[-1] if found else text


def run_sandboxed(program: str, stdin: str, seconds: float, tests: str = "", nonce: str = "") -> ProgramResult:
    """Return what a program printed, run without network, files to write, other processes, or more than its time.

    Raises:
        DataError: this machine cannot lock a process up, so nothing was run.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-rl-code-") as name:
        folder = Path(name)
        for file, text in (("program.py", program), ("tests.py", tests), ("stdin", stdin)):
            (folder / file).write_text(text, encoding="utf-8", errors="replace")
        limits = [str(math.ceil(seconds)), str(MEMORY_BYTES)]
        command = [sys.executable, "-I", "-S", sandbox.__file__, "program.py", "tests.py", nonce, *limits]
        with (folder / "stdin").open("rb") as source, (folder / "stdout").open("wb") as sink:
            child = subprocess.Popen(
                command, stdin=source, stdout=sink, stderr=subprocess.DEVNULL, cwd=folder, env={}, close_fds=True
            )
            try:
                child.wait(seconds)
                failure = f"ended with {child.returncode}" if child.returncode else ""
            except subprocess.TimeoutExpired:
                failure = f"took longer than {seconds:.1f} s"
            finally:
                child.kill()
                child.wait()
        if child.returncode == sandbox.NO_LOCK:
            raise DataError("no seccomp filter on this machine: code is not run without one (the verifier code)")
        return ProgramResult((folder / "stdout").read_text(encoding="utf-8", errors="replace"), failure)


class CodeVerifier:
    """Scores 1 if all tests of the answer pass, else 0."""

    def __init__(self, reward: Reward) -> None:
        self.seconds = reward.seconds * TIME_SHARE

    def __call__(self, prompt: Prompt, response: Response) -> Verdict:
        """Return the verdict; DataError if the answer holds no tests."""
        program, deadline = extract_program(response.answer_text), time.monotonic() + self.seconds
        for stdin, wanted, asserts in parse_tests(prompt.answer):
            nonce = secrets.token_hex(16) if asserts else ""
            left = max(deadline - time.monotonic(), 0.01)
            outcome = run_sandboxed(program, stdin, left, asserts, nonce)
            if outcome.failure:
                return Verdict(0.0, False, outcome.failure)
            if asserts and not outcome.printed.endswith(nonce):
                return Verdict(0.0, False, "ended before its tests")
            if not asserts and outcome.printed.split() != wanted.split():
                return Verdict(0.0, False, f"printed {outcome.printed[:80]!r} instead of {wanted[:80]!r}")
        return Verdict(1.0, True)


def parse_tests(answer: str) -> Iterator[tuple[str, str, str]]:
    """Yield stdin, what is to be printed, and asserts, of each test."""
    try:
        tests = json.loads(answer)
    except ValueError as error:
        raise DataError(f"not JSON: {answer[:80]!r} (the answer of a prompt with the verifier code)") from error
    match tests:
        case {"inputs": [*inputs], "outputs": [*outputs]} if len(inputs) == len(outputs) > 0:
            yield from ((str(stdin), str(wanted), "") for stdin, wanted in zip(inputs, outputs, strict=True))
        case {"asserts": str(asserts)} if asserts.strip():
            yield "", "", asserts
        case _:
            raise DataError(
                f"no tests in {answer[:80]!r} (the verifier code); write inputs and outputs of one length, or asserts"
            )


_TRIES = """
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
    """Yield what keeps this machine from running code in the sandbox, by trying to get out of it."""
    try:
        outcome = run_sandboxed(_TRIES, "", 10.0)
    except DataError as error:
        yield str(error)
        return
    if outcome.failure or outcome.printed.strip() != "locked":
        yield f"the sandbox of the verifier code does not hold here: {outcome.failure or outcome.printed.strip()!r}"
