"""Jobs of ``megatron-rl slurm`` on a real Slurm: two nodes for the trainer, one for the fleet, all on this machine."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.toml"

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


def words(run: Path, *more: str) -> list[str]:
    """Return a small run: two trainer ranks on two nodes (tensor 2, expert 2), two servers on a third."""
    settings: dict[str, object] = {
        "log.path": run,
        "slurm.python": sys.executable,
        "slurm.gpus_per_node": 0,
        "slurm.nodes": 2,
        "slurm.rollout_nodes": 1,
        "slurm.cpus_per_rank": 1,
        "slurm.stop_seconds": 60,
        "slurm.time_limit": "0:10:00",
        "rollout.servers": 2,
        "train.steps": 6,
        "checkpoint.every": 1,
        "train.prompts_per_step": 8,
        "train.group_size": 4,
        "evaluate.every": 0,
        "checkpoint.export": "false",
    }
    settings |= dict(word.split("=", 1) for word in more)
    return [str(DEMO), *(f"{key}={value}" for key, value in settings.items())]


def submit(cluster: Cluster, given: list[str]) -> str:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEGATRON_RL_DEVICE": "cpu"}
    said = cluster.run([sys.executable, "-m", "megatron_rl", "slurm", *given, "--submit"], cwd=ROOT, env=environment)
    found = re.search(r"submitted job (\d+)", said)
    assert found, said
    return found[1]


def curve(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["reward_mean"], line["loss"]) for line in lines]


def log_of(run: Path, job: str) -> str:
    texts = [run / "slurm" / f"job-{job}.log", *sorted((run / "slurm").glob(f"{job}.*/*.log"))]
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in texts if path.exists())


def wait_for_steps(cluster: Cluster, run: Path, job: str, count: int, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
        assert time.monotonic() < deadline, log_of(run, job)
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), log_of(run, job)
        time.sleep(0.25)


def nothing_left(cluster: Cluster, run: Path) -> None:
    deadline = time.monotonic() + 20
    while left := cluster.processes(str(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.25)


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory) -> Path:
    """A run of six steps that nobody disturbs."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    job = submit(cluster, words(run))
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=300)
    assert state["JobState"] == "COMPLETED", log_of(run, job)
    text = log_of(run, job)
    assert "Preflight" in text, text
    assert "all-reduce over 2 ranks" in text, text
    nothing_left(cluster, run)
    return run


def test_a_job_of_two_nodes_and_a_fleet_trains_to_its_end(uninterrupted):
    assert [step for step, _, _ in curve(uninterrupted)] == [0, 1, 2, 3, 4, 5]
    assert len(list(uninterrupted.glob("fleet/*/server_*.json"))) == 2


def finish(cluster: Cluster, run: Path, job: str) -> None:
    state = cluster.wait_for(job, "PENDING", "COMPLETED", "FAILED", "TIMEOUT")
    assert state["JobState"] == "PENDING", log_of(run, job)
    cluster.start_now(job)
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=300)
    assert state["JobState"] == "COMPLETED", log_of(run, job)
    assert state["Restarts"] == "1"
    nothing_left(cluster, run)


def test_the_signal_before_the_time_limit_ends_in_a_checkpoint_and_the_same_curve(cluster, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    job = submit(cluster, words(run))
    wait_for_steps(cluster, run, job, 1)

    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    finish(cluster, run, job)

    assert "the time limit is near: the job goes back into the queue" in log_of(run, job)
    assert curve(run) == curve(uninterrupted)


def test_a_node_that_dies_costs_no_step(cluster, uninterrupted, tmp_path):
    run = tmp_path / "node"
    job = submit(cluster, words(run, "train.steps=10000"))
    wait_for_steps(cluster, run, job, 2)

    victim = cluster.job(job)["NodeList"]
    name = cluster.run(["scontrol", "show", "hostnames", victim]).split()[-1]
    cluster.kill_node(name)
    cluster.wait_for(job, "PENDING", seconds=90)  # after SlurmdTimeout and a little
    before = len(curve(run))
    cluster.start_node(name)
    cluster.start_now(job)
    wait_for_steps(cluster, run, job, before + 6)
    cluster.run(["scancel", job])
    nothing_left(cluster, run)

    assert cluster.job(job)["Restarts"] == "1"
    assert [step for step, _, _ in curve(run)] == list(range(len(curve(run))))
    assert curve(run)[:6] == curve(uninterrupted)


def test_scancel_leaves_nothing_behind(cluster, tmp_path):
    run = tmp_path / "cancelled"
    job = submit(cluster, words(run))
    wait_for_steps(cluster, run, job, 1)

    cluster.run(["scancel", job])

    cluster.wait_for(job, "CANCELLED", seconds=30)
    nothing_left(cluster, run)


def test_more_nodes_than_there_are_is_an_error_at_once(cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"Slurm would never start .*PartitionNodeLimit"):
        submit(cluster, words(tmp_path / "run", "slurm.nodes=8"))


def test_an_odd_node_stops_the_job_before_the_model_is_loaded(cluster, tmp_path):
    run, wrapper = tmp_path / "odd", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME $4" = "node2 report" ] && exit 1\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)

    job = submit(cluster, words(run, f"slurm.python={wrapper}"))

    cluster.wait_for(job, "FAILED", seconds=180)
    assert "preflight: node2 wrote no report" in log_of(run, job)
    assert not (run / "metrics.jsonl").exists()


def test_a_spare_node_takes_the_place_of_an_odd_one(cluster, tmp_path):
    run, wrapper = tmp_path / "spare", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME $4" = "node1 report" ] && exit 1\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    shared = ["slurm.spare_nodes=1", "slurm.rollout_nodes=0", "train.steps=1", f"slurm.python={wrapper}"]

    job = submit(cluster, words(run, *shared))

    state = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert state["JobState"] == "COMPLETED", log_of(run, job)
    assert "preflight: node1 wrote no report" in log_of(run, job)
    nothing_left(cluster, run)
