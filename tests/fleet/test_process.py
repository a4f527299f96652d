import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megatron_rl.errors import DataError, RolloutError
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.fleet.sglang import sglang_server
from megatron_rl.fleet.vllm import vllm_server
from megatron_rl.util.ports import free_port, reserve_port
from megatron_rl.weights.tensor import TensorTransport

pytestmark = pytest.mark.processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def sleeper(tmp_path: Path, command: list[str]) -> ServerProcess:
    return ServerProcess(command, "127.0.0.1", free_port(), tmp_path / "log")


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("command", [SLEEP, STUBBORN])
@pytest.mark.parametrize("frozen", [False, True])
def test_stop_ends_a_process_whatever_it_does(tmp_path: Path, command: list[str], frozen: bool) -> None:
    process = sleeper(tmp_path, command)
    process.start()
    wait_for(process.log_path, "up")
    assert os.getpgid(process.pid) == process.pid
    if frozen:
        os.kill(process.pid, signal.SIGSTOP)
    process.grace_seconds = 0.3
    process.stop()
    assert is_gone(process.pid)
    process.stop()


def test_a_server_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from megatron_rl.fleet.process import ServerProcess
from megatron_rl.util.ports import free_port
server = ServerProcess({SLEEP!r}, "127.0.0.1", free_port(), Path({str(tmp_path / "log")!r}))
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        wait_for(tmp_path / "log", "up")
        os.kill(child, signal.SIGSTOP)  # even if it cannot do anything about it itself
        parent.kill()
    deadline = time.monotonic() + 5
    while not is_gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = ServerProcess(SLEEP, "127.0.0.1", port, tmp_path / "log")
        with pytest.raises(RolloutError, match=f"cannot start a server on 127.0.0.1:{port}: .*choose another port"):
            process.start()
    assert process.exit_status is None


def test_a_port_stays_reserved_while_its_server_starts(tmp_path: Path) -> None:
    with closing(reserve_port("127.0.0.1", 0)) as reservation, socket.socket() as other, socket.socket() as server:
        address = reservation.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
        socket.create_connection(address, timeout=10).close()
        with pytest.raises(RolloutError, match="in use"):
            reserve_port(*address)
    process = sleeper(tmp_path, SLEEP)
    process.start()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((process.host, process.port))
    process.stop()
    with socket.socket() as other:
        other.bind((process.host, process.port))


def test_a_server_that_ends_while_starting_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = sleeper(tmp_path, [sys.executable, "-c", "import sys; sys.exit('fire')"])
    with pytest.raises(RolloutError, match=r"ended with status 1 while starting; its log .*\nfire"):
        Fleet.open([server], TensorTransport(1 << 20), Timeouts(start_timeout_seconds=60))
    assert is_gone(server.pid)


def test_servers_listen_on_the_address_that_they_are_given(tmp_path: Path, moe_folder: Path) -> None:
    common = (str(moe_folder), tmp_path / "log")
    for server in (
        embedded_server(*common, host="127.0.0.2"),
        sglang_server("python", *common, {}, {}, "127.0.0.2"),
        vllm_server("python", *common, {}, {}, "127.0.0.2"),
    ):
        assert server.url == f"http://127.0.0.2:{server.port}"
        assert server.command[server.command.index("--host") + 1] == "127.0.0.2"


def test_a_folder_without_a_model_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no model at .*config\.json is missing"):
        embedded_server(str(tmp_path / "nothing"), tmp_path / "log")
