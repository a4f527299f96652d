"""Verifier hosts give the verdicts of local processes, also when one of them is killed, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.tasks import hosts
from megatron_rl.tasks.host_registry import read_hosts
from megatron_rl.tasks.hosts import VerifierHosts
from megatron_rl.tasks.open_verifier import open_verifier
from megatron_rl.tasks.pool import VerifierPool
from megatron_rl.tasks.verifier_host import KEY
from tests.tasks.test_rewards import VERIFIER, group, run_of

TEXTS = ["7", "8", "nan", "none", "raise", "7"] * 8


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(VERIFIER)
    return tmp_path / "hosts"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail if a test leaves a process or a descriptor."""
    this = psutil.Process()
    children, descriptors = set(this.children(recursive=True)), this.num_fds()
    yield
    assert set(this.children(recursive=True)) == children
    assert this.num_fds() <= descriptors


def run_on(registry: Path, *words: str) -> Run:
    judge = f"task.verifier={registry.parent}/judge.py:judge"
    return run_of(registry.parent, judge, f"reward.registry={registry}", "reward.seconds=2", *words)


class Host:
    """A verifier host, started when entered."""

    def __init__(self, registry: Path, *options: str, key: str = "secret") -> None:
        before = read_hosts(registry)
        command = [sys.executable, "-m", "megatron_rl.tasks.verifier_host", "--registry", str(registry), *options]
        self.process = psutil.Popen(command, env={**os.environ, KEY: key}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while read_hosts(registry) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        family = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        psutil.wait_procs(family, timeout=30)
        assert not [process for process in family if process.is_running()]

    def family(self) -> list[psutil.Process]:
        return self.process.children(recursive=True) if self.process.is_running() else []


@pytest.fixture(autouse=True)
def known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")


@pytest.mark.processes
def test_a_host_killed_in_a_step_changes_no_verdict(registry):
    with closing(VerifierPool(run_on(registry))) as pool:
        expected = pool.submit([group(*TEXTS), group("7")]).result(120)
    with Host(registry) as first, Host(registry) as second, closing(open_verifier(run_on(registry))) as verifier:
        assert isinstance(verifier, VerifierHosts)
        assert verifier.submit([group(*TEXTS), group("7")]).result(120) == expected
        deadline = time.monotonic() + 30
        while not (first.family() and second.family()):
            assert time.monotonic() < deadline
        pending = verifier.submit([group(*TEXTS), group("7")])
        family = first.family()
        first.process.send_signal(signal.SIGKILL)
        assert pending.result(120) == expected
        psutil.wait_procs(family, timeout=30)
        assert not [process for process in family if process.is_running()]


@pytest.mark.processes
def test_a_host_that_joins_takes_what_waits(registry, monkeypatch):
    monkeypatch.setattr(hosts, "_POLL_SECONDS", 0.1)
    with Host(registry) as first, closing(open_verifier(run_on(registry))) as verifier:
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        pending = verifier.submit([group("7", "8")])
        time.sleep(0.5)
        assert not pending.done()
        with Host(registry):
            assert [verdict.score for verdict in pending.result(60)[0]] == [1.0, 0.0]
            verifier.close()


@pytest.mark.processes
def test_jobs_without_a_host_end_unverified(registry, monkeypatch):
    monkeypatch.setattr(hosts, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "NO_HOST_SECONDS", 1.0)
    with Host(registry) as only, closing(open_verifier(run_on(registry))) as verifier:
        only.process.send_signal(signal.SIGKILL)
        only.process.wait()
        [[verdict]] = verifier.submit([group("7")]).result(60)
        assert (verdict.score, verdict.failure) == (None, "raised")
        assert "no verifier host for 1 s" in verdict.reason


@pytest.mark.processes
def test_a_wrong_key_and_a_missing_host_are_one_error(registry, monkeypatch):
    monkeypatch.setattr(hosts, "START_SECONDS", 1.0)
    with Host(registry, key="another"), pytest.raises(DataError, match="wrong key"):
        open_verifier(run_on(registry))
    with pytest.raises(DataError, match=r"no verifier host .* \(reward.registry\) .* \(no addresses\); start some"):
        open_verifier(run_on(registry))


@pytest.mark.processes
def test_a_connection_that_says_nothing_sensible_starts_no_process(registry):
    with Host(registry) as host:
        [address] = read_hosts(registry)
        for greeting in (b"", b"\n", b"[1]\n", b'{"key": 1}\n', b'{"key": "\xff"}\n', b"x" * 10_000):
            with socket.create_connection(address, 30) as connection:
                connection.sendall(greeting)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1000)
        assert not host.family()
        with closing(open_verifier(run_on(registry))) as verifier:
            assert verifier.submit([group("7")]).result(60)[0][0].score == 1.0


@pytest.mark.processes
def test_a_host_open_to_others_needs_a_key():
    command = [sys.executable, "-m", "megatron_rl.tasks.verifier_host", "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("--host 0.0.0.0 lets other hosts run code here; set a secret")


@pytest.mark.parametrize("line", ["localhost", "localhost:", "host:x", ":80", "host:99999"])
def test_an_address_that_is_none_is_named(tmp_path, line):
    (tmp_path / "hosts").write_text(f"# hosts\n\nlocalhost:80\n{line}\n")
    with pytest.raises(DataError, match=r"is no address; write host:port"):
        read_hosts(tmp_path / "hosts")
