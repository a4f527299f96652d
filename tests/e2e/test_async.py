"""Runs with a lag, and faults that no step may notice: what became of every group stands in the ledger."""

import json
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.fleet.process import ServerProcess, embedded_server
from megatron_rl.rollout.buffer import TRAINED
from tests.e2e.job import ONE_RANK, ROOT, Job, same_result
from tests.e2e.ledger import audit

RESUME = "train.resume=true"
LAG = ("rollout.max_lag=1", "rollout.sequences_per_server=8", "rollout.receivers=1", "train.steps=6")


def whole(folder: Path, steps: int, max_lag: int) -> None:
    """Assert that every step trained on the four prompts that are its own, each sampled once, none too old."""
    assert audit(folder, 4, max_lag)[TRAINED] == 4 * steps
    samples = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    used = Counter((sample["step"], sample["prompt_id"]) for sample in samples)
    assert len({sample["id"] for sample in samples}) == len(samples) == 16 * steps
    assert used == {(step, f"train-0-{4 * step + i}"): 4 for step in range(steps) for i in range(4)}
    for sample in samples:
        assert all(0 <= sample["step"] - version <= max_lag for version, _, _ in sample["weight_versions"])


def test_a_server_killed_while_a_lagging_run_samples_costs_no_group(tmp_path):
    with Job(tmp_path / "run", *ONE_RANK, *LAG, "rollout.servers=2") as job:
        job.until_steps(1)
        job.servers()[0].kill()
        job.until_steps(3)
        job.servers()[-1].kill()
        assert job.end() == 0, job.output()
        assert job.output().count("left the fleet") <= 2, job.output()
        assert max(line["lag_max"] for line in job.metrics()) == 1
    whole(tmp_path / "run", 6, 1)


def test_a_lagging_run_that_is_stopped_goes_on_with_what_it_had(tmp_path):
    folder = tmp_path / "run"
    with Job(folder, *LAG) as job:
        job.until_steps(2).process.send_signal(signal.SIGTERM)
        assert job.end() == 130, job.output()
        assert "Traceback" not in job.output()
    (saved,) = (folder / "checkpoints").glob("step_*/sampler.json")
    assert json.loads(saved.read_text())["plans"]
    with Job(folder, *LAG, RESUME) as job:
        assert job.end() == 0, job.output()
    whole(folder, 6, 1)


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that no run started, and that outlives them."""
    options = ["--weight-version", "0"]
    server = embedded_server(str(ROOT / "configs" / "demo-model"), tmp_path / "server.log", options)
    server.start()
    yield server
    server.stop()


def version_of(server: ServerProcess) -> str:
    try:
        with urllib.request.urlopen(f"{server.url}/model_info", timeout=5) as answer:
            return json.load(answer)["weight_version"]
    except OSError:
        return ""


def test_a_trainer_that_dies_between_push_and_checkpoint_resumes_to_the_same_result(tmp_path, straight, foreign):
    folder = tmp_path / "run"
    settings = (f'rollout.urls=["{foreign.url}"]', "checkpoint.every=1")
    with Job(folder, *settings) as job:
        job.until(lambda: version_of(foreign) == "2").ranks()[0].kill()
        assert job.end() == 2
    assert version_of(foreign) in ("2", "3")
    with Job(folder, *settings, RESUME) as job:
        assert job.end() == 0, job.output()
    same_result(folder, straight)
    assert (folder / "ledger.jsonl").read_bytes() == (straight / "ledger.jsonl").read_bytes()
    whole(folder, 4, 0)


def test_a_server_that_is_stopped_for_longer_than_the_timeout_changes_nothing(tmp_path, straight):
    with Job(tmp_path / "run", "rollout.request_timeout_seconds=3") as job:
        (server,) = job.until_steps(1).servers()
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(6)
        os.kill(server.pid, signal.SIGCONT)
        assert job.end() == 0, job.output()
        # A stop during a request loses the server until the next push; a stop during a push only delays it.
        assert job.output().count("left the fleet") <= 2, job.output()
    same_result(tmp_path / "run", straight)


def test_all_servers_down_for_a_while_are_waited_for(tmp_path, straight):
    with Job(tmp_path / "run", "rollout.servers=2") as job:
        for server in job.until_steps(1).servers():
            server.kill()
        assert job.end() == 0, job.output()
        assert job.output().count("left the fleet") <= 2, job.output()
    same_result(tmp_path / "run", straight)
    whole(tmp_path / "run", 4, 0)
