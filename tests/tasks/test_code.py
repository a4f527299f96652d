"""Programs of the model in the sandbox: tests decide the score, and nothing escapes."""

import json
import socket
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_rl.config.tasks import Reward
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks import sandbox
from megatron_rl.tasks.code import (
    CodeVerifier,
    _run_sandboxed,
    bubblewrap,
    check_sandbox,
    extract_program,
    run_sandboxed,
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's seccomp"),
]

ADD = "a, b = map(int, input().split())\nprint(a + b)"


def verify(text: str, tests: object, seconds: float = 5.0):
    response = Response("r", "p", 0, np.array((1,)), np.array((0.0,)), text, "stop", ())
    return CodeVerifier(Reward(seconds=seconds))(Prompt("p", (), "q", json.dumps(tests)), response)


def test_the_sandbox_works_on_this_machine():
    assert list(check_sandbox()) == []


def test_programs_are_scored_by_their_output():
    tests = {"inputs": ["1 2\n", "10 -4\n"], "outputs": ["3", "6\n"]}
    assert verify(f"First:\n```python\nnonsense(\n```\nthen\n```python\n{ADD}\n```\n", tests).score == 1.0
    assert verify(ADD, tests).correct
    wrong = verify(ADD.replace("+", "*"), tests)
    assert (wrong.score, wrong.reason) == (0.0, "printed '2\\n' instead of '3'")
    assert verify("raise SystemExit(1)", tests).score == 0.0
    assert verify("this is no program", tests).score == 0.0


def test_a_program_cannot_skip_its_asserts_by_exiting():
    tests = {"asserts": "assert add(1, 2) == 3\nassert add(0, 0) == 0"}
    assert verify("def add(a, b): return a + b", tests).score == 1.0
    assert verify("def add(a, b): return 3", tests).score == 0.0
    for early in ("import sys; sys.exit(0)", "import os; os._exit(0)"):
        assert verify(early, tests).score == 0.0


def test_a_program_that_does_not_end_is_wrong_not_unverified():
    assert verify("while True: pass", {"inputs": [""], "outputs": [""]}, 1.0).score == 0.0
    assert verify("import time; time.sleep(100)", {"inputs": [""], "outputs": [""]}, 1.0).score == 0.0


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true') and 1/0",
        "import os; os.execv('/bin/true', ['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing as m; m.Process(target=print).start()",
        "x = bytearray(1 << 33)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 0)",
        "open('made', 'w')",
        "open('program.py', 'a')",
        "import os; os.mkdir('made')",
        "import os; os.unlink('program.py')",
        "import os; os.chmod('program.py', 0o777)",
        "import os; os.symlink('/', 'made')",
        "import tempfile; tempfile.TemporaryFile()",
        "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
        "import ctypes; ctypes.CDLL(None).ptrace(16, 1, 0, 0) and 1/0",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "while True: print('x' * 1000)",
    ],
)
def test_forbidden_operations_fail(program):
    assert run_sandboxed(program, "", 3.0).failure


def test_there_is_no_network_and_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        assert run_sandboxed(f"import socket; socket.create_connection(('127.0.0.1', {port}))", "", 3.0).failure
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "SECRET" not in run_sandboxed("import os; print(dict(os.environ))", "", 3.0).stdout


def test_no_process_remains():
    before = len(psutil.Process().children())
    run_sandboxed("import time; time.sleep(100)", "", 0.5)
    assert len(psutil.Process().children()) == before


@pytest.mark.parametrize("answer", ["7", '{"inputs": ["1"], "outputs": []}', '{"asserts": ""}', "no json"])
def test_an_answer_without_tests_is_an_error(answer):
    response = Response("r", "p", 0, np.array((1,)), np.array((0.0,)), "x", "stop", ())
    with pytest.raises(DataError, match="the verifier code"):
        CodeVerifier(Reward())(Prompt("p", (), "q", answer), response)


def test_the_last_fenced_block_is_the_program():
    assert extract_program("```py\na\n```\ntext\n```\nb\n```") == "b\n"
    assert extract_program("print(1)") == "print(1)"


ADD_TESTS = {"inputs": ["1 2\n"], "outputs": ["3\n"]}


@pytest.mark.parametrize(
    "program",
    [
        f"{ADD}\nexit()",
        f"{ADD}\nquit()",
        f"import sys\n{ADD}\nsys.exit()",
        f"{ADD}\nraise SystemExit",
        "if input():\n    print(3)\n    exit(0)\nprint(4)",
        "import os\nprint(3, flush=True)\nos._exit(0)",
        "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\nprint(3)",
        "from __future__ import annotations\nimport dataclasses as d\n@d.dataclass\nclass A: x: int\nprint(A(3).x)",
        "from typing import get_type_hints\nclass B: pass\nclass A:\n    x: 'B'\nget_type_hints(A)\nprint(3)",
        "import sys\nassert sys.modules['__main__'].__dict__ is globals()\nprint(3)",
        "if __name__ == '__main__':\n    print(3)",
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "import fileinput\nfor line in fileinput.input():\n    print(sum(map(int, line.split())))",
        "import sys\nprint(3 + len(sys.argv[1:]))",
        "import decimal, zoneinfo, ssl, sqlite3, unicodedata, hashlib, random, uuid\nprint(3)",
        "import sys\nprint('debug', file=sys.stderr)\nprint(3)",
    ],
)
def test_common_idioms_are_paid(program):
    verdict = verify(program, ADD_TESTS)
    assert (verdict.score, verdict.reason) == (1.0, "")


@pytest.mark.parametrize("code", [1, 42, 96, 97, 98, 126, 127, 137, 255])
def test_any_exit_code_is_the_failure_of_the_program(code):
    verdict = verify(f"import os\nprint(3, flush=True)\nos._exit({code})", ADD_TESTS)
    assert (verdict.score, verdict.failure) == (0.0, "")


def test_the_future_imports_of_the_sandbox_are_not_those_of_the_program():
    assert verify("def f(x: undefined): pass", {"asserts": "assert 1"}).score == 0.0


SECRET = "the-expected-output-4711"

READ_MEMORY = """
import os, re
def search(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if "rw" in line and last - first < 1 << 28:
                memory.seek(first)
                print(re.findall(rb"the-expected-output-[0-9]+", memory.read(last - first)))
"""

ESCAPES = {
    "memory of the parent": READ_MEMORY + "search(os.getppid())",
    "memory of any process": READ_MEMORY + "for pid in filter(str.isdigit, os.listdir('/proc')): search(pid)",
    "environment of the parent": "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
    "command line of the parent": "import os; print(open(f'/proc/{os.getppid()}/cmdline').read()); 1/0",
    "jobs of others": "import os; os.read(os.open(f'/proc/{os.getppid()}/fd/0', os.O_RDONLY | os.O_NONBLOCK), 1)",
    "descriptors of the parent": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "signal by F_SETOWN": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "signal number by F_SETSIG": "import fcntl; fcntl.fcntl(0, 10, 9)",
    "owner of signals by F_SETOWN_EX": "import fcntl, struct; fcntl.fcntl(0, 15, struct.pack('ii', 1, 1))",
    "lease, which signals": "import fcntl; fcntl.fcntl(0, 1024, 0)",
    "terminal input": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "file of the user": "import pathlib; print(pathlib.Path(HIDDEN).read_text())",
    "file through the root of the parent": "import os; open(f'/proc/{os.getppid()}/root' + HIDDEN).read()",
    "file through the folder of the parent": "import os; open(f'/proc/{os.getppid()}/cwd/pyproject.toml').read()",
    "list of the home": "import os; print(os.listdir(os.path.dirname(HIDDEN)))",
    "list of the passwords": "open('/etc/shadow').read()",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'w')",
    "limits of others": "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "priority of others": "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "processor of others": "import os; os.sched_setaffinity(os.getppid(), {0})",
    "memory by a call": "import ctypes; ctypes.CDLL(None).process_vm_readv(1, 0, 0, 0, 0, 0) < 0 and 1/0",
    "descriptor by a call": "import ctypes\nif ctypes.CDLL(None).syscall(438, 3, 0, 0) < 0: 1/0",
    "new namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) < 0: 1/0",
    "ring of requests": "import ctypes\nif ctypes.CDLL(None).syscall(425, 8, bytes(120)) < 0: 1/0",
    "32-bit call": "import ctypes\nif ctypes.CDLL(None).syscall(0x40000000 + 41, 1, 1, 0) < 0: 1/0",
    "writable descriptor": "import os\nfor fd in range(3, 64): os.write(fd, b'1') and print('wrote')\n",
}


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("tool", ["filter", "bubblewrap"])
def test_escapes_fail(tmp_path, monkeypatch, name, tool):
    if tool == "bubblewrap" and bubblewrap() is None:
        pytest.skip("bubblewrap is not installed, or cannot make namespaces here")
    monkeypatch.setenv("SECRET", SECRET)
    (tmp_path / "hidden").write_text(SECRET)
    program = f"HIDDEN = {str(tmp_path / 'hidden')!r}\n{ESCAPES[name]}"
    result = _run_sandboxed(bubblewrap() if tool == "bubblewrap" else None, program, "", 10.0)
    assert result.failure or name == "memory of any process"
    assert SECRET not in result.stdout
    assert "wrote" not in result.stdout


def test_a_machine_whose_kernel_hides_no_files_is_refused(monkeypatch, tmp_path):
    source = (
        Path(sandbox.__file__)
        .read_text()
        .replace("hide_files(os.getcwd())", "")
        .replace("    drop_capabilities()\n", "")
    )
    (tmp_path / "sandbox.py").write_text(source)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    monkeypatch.setattr("megatron_rl.tasks.code.bubblewrap", lambda: None)
    (problem,) = check_sandbox()
    assert "a program can read the memory of other processes" in problem
    assert "install bubblewrap" in problem
