"""Jobs of ``megatron-rl slurm`` on a real Slurm: two nodes for the trainer, one for the fleet, all on this machine."""

import json
import os
import re
import signal
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
        "slurm.preflight": "false",  # saves time in tests that do not need it
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


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEGATRON_RL_DEVICE": "cpu"}
PREFLIGHT = "slurm.preflight=true"
SERVE_NODE = "megatron_rl.launch.slurm.serve_node"


def submit(cluster: Cluster, given: list[str]) -> str:
    output = cluster.run([sys.executable, "-m", "megatron_rl", "slurm", *given, "--submit"], cwd=ROOT, env=ENVIRONMENT)
    found = re.search(r"submitted job (\d+)", output)
    assert found, output
    return found[1]


def curve(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["reward_mean"], line["loss"]) for line in lines]


def log_of(run: Path, job: str) -> str:
    texts = [run / "slurm" / f"job-{job}.log", *sorted((run / "slurm").glob(f"{job}.*/*.log"))]
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in texts if path.exists())


def wait_for_steps(cluster: Cluster, run: Path, job: str, count: int, *, start: bool = False) -> None:
    """Wait for ``count`` steps; with ``start``, start the job without Slurm's delay whenever it is pending."""
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
        if start and cluster.job(job)["JobState"] == "PENDING":
            cluster.start_now(job)
        assert time.monotonic() < deadline, log_of(run, job)
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), log_of(run, job)
        time.sleep(0.25)


def nothing_left(cluster: Cluster, run: Path) -> None:
    deadline = time.monotonic() + 20
    while left := cluster.processes(str(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.25)


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory) -> Path:
    """A run of six steps without interruption."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    job = submit(cluster, words(run, PREFLIGHT))
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=300)
    assert state["JobState"] == "COMPLETED", log_of(run, job)
    text = log_of(run, job)
    assert "Preflight" in text, text
    assert "all-reduce over 2 ranks" in text, text
    assert len(re.findall(r"http://127\.0\.0\.1:\d+ .* ok .* \d+ ms", text)) == 2, text
    nothing_left(cluster, run)
    return run


def test_a_job_with_two_nodes_and_a_fleet_completes(uninterrupted):
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


def test_a_stop_signal_ends_in_a_checkpoint_and_the_requeued_job_has_the_same_curve(cluster, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    job = submit(cluster, words(run, "checkpoint.every=0"))
    wait_for_steps(cluster, run, job, 1)

    cluster.run(["scancel", "--batch", "--signal=USR1", job])
    finish(cluster, run, job)

    text = log_of(run, job)
    assert "the trainer ended with 130" in text, text
    assert "the time limit is near: the job is requeued" in text
    assert curve(run) == curve(uninterrupted)


@pytest.mark.slow
def test_the_time_limit_ends_in_a_checkpoint_and_the_same_curve(cluster, uninterrupted, tmp_path):
    """Slurm sends the signal 60 s before the limit of 3 minutes, or up to 30 s earlier still."""
    run = tmp_path / "limit"
    job = submit(cluster, words(run, "slurm.time_limit=0:03:00", "train.steps=10000", "checkpoint.every=0"))
    cluster.wait_for(job, "RUNNING")
    state = cluster.wait_for(job, "PENDING", "FAILED", "TIMEOUT", seconds=200)
    assert state["JobState"] == "PENDING", log_of(run, job)
    before = len(curve(run))
    assert before >= 1, log_of(run, job)
    wait_for_steps(cluster, run, job, max(before + 2, 6), start=True)
    cluster.run(["scancel", job])
    nothing_left(cluster, run)

    assert "the trainer ended with 130" in log_of(run, job)
    assert cluster.job(job)["Restarts"] == "1"
    assert [step for step, _, _ in curve(run)] == list(range(len(curve(run))))
    assert curve(run)[:6] == curve(uninterrupted)


def rank(cluster: Cluster, run: Path, number: int) -> int:
    """Return the process of a trainer rank."""
    for pid in cluster.processes(str(run)):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"train" in command and f"SLURM_PROCID={number}".encode() in environment:
            return pid
    raise AssertionError(f"no process of rank {number}")


def test_a_stopped_rank_is_reported_and_the_job_continues_from_its_checkpoint(cluster, uninterrupted, tmp_path):
    run = tmp_path / "hang"
    job = submit(cluster, words(run, "train.step_timeout_seconds=20", "slurm.restarts=1"))
    wait_for_steps(cluster, run, job, 1)

    os.kill(rank(cluster, run, 1), signal.SIGSTOP)
    finish(cluster, run, job)

    assert "no answer from rank 1: dead, stopped" in (run / "hang" / "report.txt").read_text()
    assert "the ranks hung, see" in log_of(run, job)
    assert curve(run) == curve(uninterrupted)


@pytest.mark.slow
def test_a_restarted_slurmd_does_not_affect_the_job(cluster, uninterrupted, tmp_path):
    run = tmp_path / "slurmd"
    job = submit(cluster, words(run))
    wait_for_steps(cluster, run, job, 1)

    cluster.kill_slurmd("node2")
    cluster.start_node("node2")

    state = cluster.wait_for(job, "PENDING", "COMPLETED", "FAILED", "NODE_FAIL", seconds=120)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), log_of(run, job)
    assert curve(run) == curve(uninterrupted)
    nothing_left(cluster, run)


@pytest.mark.parametrize("place", ["trainer", pytest.param("fleet", marks=pytest.mark.slow)])
def test_a_node_that_dies_costs_no_step(place, cluster, uninterrupted, tmp_path):
    run = tmp_path / "node"
    job = submit(cluster, words(run, "train.steps=10000"))
    wait_for_steps(cluster, run, job, 2)

    component = job if place == "trainer" else f"{job}+1"
    name = cluster.run(["scontrol", "show", "hostnames", cluster.job(component)["NodeList"]]).split()[-1]
    cluster.kill_node(name)
    cluster.wait_for(job, "PENDING", seconds=90)  # after SlurmdTimeout and a little
    before = len(curve(run))
    cluster.start_node(name)
    # Within a minute Slurm hands the kill of the dead step to the new one of its number: the job is queued once more.
    wait_for_steps(cluster, run, job, before + 6, start=True)
    cluster.run(["scancel", job])
    nothing_left(cluster, run)

    assert cluster.job(job)["Restarts"] in ("1", "2")
    assert [step for step, _, _ in curve(run)] == list(range(len(curve(run))))
    assert curve(run)[:6] == curve(uninterrupted)


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_no_step(cluster, uninterrupted, tmp_path):
    run = tmp_path / "rank"
    job = submit(cluster, words(run))
    wait_for_steps(cluster, run, job, 2)

    os.kill(rank(cluster, run, 1), signal.SIGKILL)
    finish(cluster, run, job)

    assert "ranks or servers were killed: the job is requeued" in log_of(run, job)
    assert curve(run) == curve(uninterrupted)


def test_scancel_leaves_no_process(cluster, tmp_path):
    run = tmp_path / "cancelled"
    job = submit(cluster, words(run))
    wait_for_steps(cluster, run, job, 1)

    cluster.run(["scancel", job])

    cluster.wait_for(job, "CANCELLED", seconds=30)
    nothing_left(cluster, run)


def test_more_nodes_than_exist_are_an_error_at_submission(cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"Slurm would never start .*PartitionNodeLimit"):
        submit(cluster, words(tmp_path / "run", "slurm.nodes=8"))


def test_a_node_that_does_not_share_the_run_folder_stops_the_job_before_the_model_is_loaded(cluster, tmp_path):
    run, wrapper = tmp_path / "apart", tmp_path / "python"
    apart = f'unshare --mount sh -c \'mount -t tmpfs none "{run}" && exec "$0" "$@"\' {sys.executable} "$@"'
    wrapper.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME $3" = "node2 report" ] && exec {apart}\nexec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)

    job = submit(cluster, words(run, PREFLIGHT, f"slurm.python={wrapper}"))

    cluster.wait_for(job, "FAILED", seconds=180)
    assert re.search(r"node2 wrote no report to .*does not share the run folder \(log.path\)", log_of(run, job))
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_server_that_never_registers_is_named_and_ends_the_job(cluster, tmp_path):
    run, wrapper = tmp_path / "server", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID $2" = "1 {SERVE_NODE}" ] && exit 1\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)

    job = submit(cluster, words(run, PREFLIGHT, "rollout.start_timeout_seconds=15", f"slurm.python={wrapper}"))

    cluster.wait_for(job, "FAILED", seconds=180)
    text = log_of(run, job)
    assert re.search(r"1 of 2 servers .* have registered in .*, 1 have not", text), text
    assert "a server of the fleet failed its check" in text
    nothing_left(cluster, run)


def test_check_cluster_checks_nodes_links_and_servers(cluster, tmp_path):
    given = words(tmp_path / "looked", "slurm.rollout_nodes=0")
    check = [sys.executable, "-m", "megatron_rl", "check", "--cluster", *given]

    output = cluster.run(["salloc", "--nodes=2", "--ntasks-per-node=2", *check], cwd=ROOT, env=ENVIRONMENT)

    assert len(re.findall(r"node[12] .* ok ", output)) == 2, output
    assert "all-to-all over 2 ranks" in output
    assert len(re.findall(r"http://\S+ .* ok .* \d+ ms", output)) == 2, output
    nothing_left(cluster, tmp_path)


def test_a_spare_node_replaces_a_faulty_one(cluster, tmp_path):
    run, wrapper = tmp_path / "spare", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME $3" = "node1 report" ] && exit 1\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    shared = [PREFLIGHT, "slurm.spare_nodes=1", "slurm.rollout_nodes=0", "train.steps=1", f"slurm.python={wrapper}"]

    job = submit(cluster, words(run, *shared))

    state = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert state["JobState"] == "COMPLETED", log_of(run, job)
    assert "preflight: node1 wrote no report" in log_of(run, job)
    nothing_left(cluster, run)
