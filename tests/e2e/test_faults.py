"""Faults: a server that dies costs nothing; a rank that dies, or a server that never answers, is one clear error."""

import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from megatron_rl.errors import TrainingError
from megatron_rl.launch.ranks import LocalRanks
from megatron_rl.tasks.verifier_host import KEY
from megatron_rl.util.exit_codes import HUNG
from tests.e2e.job import ONE_RANK, Job, same_result
from tests.tasks.test_verifier_hosts import Host


def test_a_killed_server_costs_time_and_nothing_else(tmp_path, straight):
    with Job(tmp_path / "run") as job:
        job.until_steps(1).server().kill()
        assert job.end() == 0, job.output()
    same_result(tmp_path / "run", straight)


def test_a_verifier_host_killed_in_a_run_changes_nothing(tmp_path, straight, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    registry = tmp_path / "hosts"
    with Host(registry) as first, Host(registry), Job(tmp_path / "run", f"reward.registry={registry}") as job:
        job.until_steps(1)
        first.process.kill()
        assert job.end() == 0, job.output()
        assert "lost the verifier host" in job.output()
    same_result(tmp_path / "run", straight)


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path):
    with Job(tmp_path / "run", "train.steps=1000") as job:
        job.until_steps(1).ranks()[1].kill()
        assert job.end() == 2
        assert "megatron-rl train: rank 1 was ended by SIGKILL" in job.output()
        assert "Traceback" not in job.output()


def test_a_killed_controller_ends_the_run_which_resumes_bit_for_bit(tmp_path, straight):
    with Job(tmp_path / "run", "checkpoint.every=1") as job:
        job.until_steps(2).controller().kill()
        assert job.end() == HUNG, job.output()
        (line,) = [line for line in job.output().splitlines() if "error: " in line]
        assert "The rollout controller (process" in line
        assert "was ended by SIGKILL" in line
        assert "train.resume=true" in line
        assert "Traceback" not in job.output()
    with Job(tmp_path / "run", "checkpoint.every=1", "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(tmp_path / "run", straight)


def test_a_full_disk_is_one_error_and_the_run_resumes_bit_for_bit(tmp_path, straight):
    folder = tmp_path / "run"
    with Job(folder, "checkpoint.every=1", "checkpoint.asynchronous=false") as job:
        job.until_steps(2)
        size = (folder / "rollouts.jsonl").stat().st_size
        job.ranks()[0].rlimit(psutil.RLIMIT_FSIZE, (size, size))  # writes beyond it fail, as on a full disk
        assert job.end() == 2, job.output()
        (line,) = [line for line in job.output().splitlines() if "cannot be written" in line]
        assert line.startswith("megatron-rl train: ")
        assert "Traceback" not in job.output()
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    with Job(folder, "checkpoint.every=1", "checkpoint.asynchronous=false", "train.resume=true") as job:
        assert job.end() == 0, job.output()
    same_result(folder, straight)


def test_nothing_outlives_a_killed_supervisor(tmp_path):
    with Job(tmp_path / "run", "train.steps=1000") as job:
        job.until_steps(1)
        assert len(job.look()) == 4  # two ranks, the controller, a server
        job.process.kill()
        assert job.end() == -signal.SIGKILL  # which waits for the others


class Garbage(BaseHTTPRequestHandler):
    """Answers everything, with nothing of sense."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def garbage() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Garbage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def only_error(job: Job) -> str:
    assert job.end() == 2, job.output()
    assert "Traceback" not in job.output()
    errors = re.findall(r"^megatron-rl train: (?!\d+ ranks? on )", job.output(), re.MULTILINE)  # except the first line
    assert len(errors) == 1, job.output()
    return job.output()


def test_a_server_that_is_not_there_is_one_error(tmp_path):
    with Job(tmp_path / "run", 'rollout.urls=["http://127.0.0.1:9"]', "rollout.start_timeout_seconds=1") as job:
        assert "the server http://127.0.0.1:9 has not become healthy within 1 s" in only_error(job)


def test_a_server_that_answers_garbage_is_one_error(tmp_path, garbage):
    with Job(tmp_path / "run", *ONE_RANK, f'rollout.urls=["{garbage}"]', "rollout.start_timeout_seconds=1") as job:
        assert garbage in only_error(job)


def test_what_nobody_expected_is_one_traceback(tmp_path, capfd):
    before = psutil.Process().children()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(TrainingError, match=r"rank \d failed, its traceback is above: \w"):
            LocalRanks(["megatron_rl.launch.debug_rank", str(tmp_path / "nowhere"), str(tmp_path)], 2).run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err.count("Traceback (most recent call last)") == 1
    assert psutil.Process().children() == before
