"""Programs of the model in the sandbox: tests decide the score, and nothing escapes."""

import json
import socket
import sys

import psutil
import pytest

from megatron_rl.config.tasks import Reward
from megatron_rl.data.types import Prompt, Response
from megatron_rl.errors import DataError
from megatron_rl.tasks.code import CodeVerifier, check_sandbox, extract_program, run_sandboxed

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's seccomp"),
]

ADD = "a, b = map(int, input().split())\nprint(a + b)"


def verify(text: str, tests: object, seconds: float = 5.0):
    response = Response("r", "p", 0, (1,), (0.0,), text, "stop", ())
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
    response = Response("r", "p", 0, (1,), (0.0,), "x", "stop", ())
    with pytest.raises(DataError, match="the verifier code"):
        CodeVerifier(Reward())(Prompt("p", (), "q", answer), response)


def test_the_last_fenced_block_is_the_program():
    assert extract_program("```py\na\n```\ntext\n```\nb\n```") == "b\n"
    assert extract_program("print(1)") == "print(1)"
