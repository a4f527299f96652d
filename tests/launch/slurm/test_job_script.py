"""The control flow of the job script, run by bash with fake srun and scontrol commands that record their arguments."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.slurm.render import render
from megatron_rl.util.exit_codes import HUNG
from tools.make_example_job import FILE, script

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]

SRUN = """#!/usr/bin/env bash
echo "$*" >> "$RECORD"
case "$*" in
    *"preflight judge "*) folder="$(sed 's/.*--folder \\([^ ]*\\) .*/\\1/' <<<"$*")"; mkdir -p "$folder"
                           echo n1 n2 > "$folder/nodes"; echo > "$folder/links" ;;
    *"preflight fleet "*) sleep "${CHECKS:-0}"; exit "${FAULTY:-0}" ;;
    *"serve_node --registry "*) folder="$(sed 's/.*--registry \\([^ ]*\\) .*/\\1/' <<<"$*")"
                            until [ -e "$folder/end" ] || [ -n "${NO_FLEET:-}" ]; do sleep 0.05; done ;;
    *" train "*) trap 'kill $!; exit 143' TERM; trap 'kill $!; made; exit "${STOPPED:-130}"' USR1
                 made() { [ -z "${STEPS:-}" ] || { sleep 0.02; touch "$STEPS"; }; }
                 sleep "${TRAINS:-0}" & wait $!
                 made
                 [ -z "${REPORT:-}" ] || { mkdir -p "$REPORT"; sleep 0.02; touch "$REPORT/report.txt"; }
                 exit "${CODE:-0}" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show node") for n in 1 2; do echo "NodeName=n$n Arch=x NodeAddr=10.0.0.$n Port=1"; done ;;
    "show hostnames") echo n1; echo n2 ;;
    "show job") echo "JobId=7 JobState=${STATE:-RUNNING}" ;;
    requeue*) echo "REQUEUE $2" >> "$RECORD"; exit 1 ;; # 1: the script must not sleep until Slurm ends it
esac
"""


class Job:
    """A rendered script in a folder with fake commands."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder, self.run_folder, self.record = folder, folder / "run", folder / "record"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        nodes = ("slurm.nodes=2", "slurm.gpus_per_node=0", f"log.path={self.run_folder}")
        words = [str(ROOT / "configs" / "demo.toml"), *nodes, *settings]
        self.script = folder / "job.sbatch"
        self.script.write_text(render(load(Run, words[:1], words[1:]), words, folder))

    def run(self, restart: int = 0, **environment: str) -> tuple[int, str]:
        """Return the exit code and the output."""
        slurm = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": str(restart),
        }
        done = subprocess.run(
            ["bash", str(self.script)], env={**os.environ, **slurm, **environment}, capture_output=True, text=True
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    @property
    def steps(self) -> list[str]:
        """The arguments of srun, in order; no step sets a key twice, which would be refused."""
        steps = self.record.read_text().splitlines()
        for step in steps:
            settings = [word.partition("=")[0] for word in step.partition(" -m megatron_rl")[2].split() if "=" in word]
            assert len(settings) == len(set(settings)), step
        return steps


def name_of(step: str) -> str:
    """Return ``train``, ``serve_node``, ``preflight STEP``, or nothing for a requeue."""
    found = re.search(r" -m megatron_rl(?:\.launch\.slurm\.)?((?:preflight)? ?[a-z_]+)", step)
    return found[1].strip() if found else ""


def steps_named(job: Job, name: str) -> list[str]:
    return [step for step in job.steps if name_of(step) == name]


def test_the_example_job_is_what_the_tool_renders():
    assert FILE.read_text() == script(), "run python tools/make_example_job.py"


def test_the_steps_of_a_job_run_in_this_order(tmp_path):
    job = Job(tmp_path)

    code, output = job.run()

    assert code == 0, output
    names = [name_of(step) for step in job.steps]
    assert names[:3] == ["preflight report", "preflight judge", "preflight link"]
    assert set(names[3:]) == {"serve_node", "train", "preflight fleet"}
    assert "--nodelist=n1,n2" in steps_named(job, "train")[0]
    assert not any("--het-group" in step for step in job.steps)
    assert "train.resume=true" not in steps_named(job, "train")[0]
    assert steps_named(job, "train")[0].endswith(f"rollout.registry={tmp_path}/run/fleet/7.0")
    assert (tmp_path / "run" / "fleet" / "7.0" / "unchecked").exists()  # the check, which removes it, is a stand-in
    assert steps_named(job, "preflight fleet")[0].endswith(f"rollout.registry={tmp_path}/run/fleet/7.0")
    assert (tmp_path / "run" / "fleet" / "7.0" / "end").exists()


def test_steps_run_on_the_component_of_a_heterogeneous_job(tmp_path):
    job = Job(tmp_path, "slurm.rollout_nodes=1")

    code, output = job.run(SLURM_HET_SIZE="2", SLURM_JOB_NODELIST_HET_GROUP_0="n", SLURM_JOB_NODELIST_HET_GROUP_1="n")

    assert code == 0, output
    groups = {name_of(step): step.split()[2] for step in job.steps}
    assert groups.pop("serve_node") == "--het-group=1"
    assert set(groups.values()) == {"--het-group=0"}


def test_a_hang_is_requeued_at_most_slurm_restarts_times(tmp_path):
    job = Job(tmp_path, "slurm.restarts=2", "slurm.preflight=false")

    for restart, requeues in ((0, 1), (1, 2), (2, 2)):
        code, output = job.run(restart, CODE=str(HUNG))
        assert code == HUNG
        assert job.steps.count("REQUEUE 7") == requeues, output
    assert "the ranks hung, see" in output
    assert "but the job was restarted 2 times already (slurm.restarts)" in output
    assert "train.resume=true" in steps_named(job, "train")[-1]


def test_a_rank_killed_after_a_hang_report_counts_as_a_hang(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")

    assert job.run(CODE="137", REPORT=str(job.run_folder / "hang"))[0] == HUNG
    assert "REQUEUE 7" in job.steps
    job.record.unlink()
    (job.run_folder / "hang" / "report.txt").touch()
    os.utime(job.run_folder / "hang" / "report.txt", (0, 0))
    assert job.run(CODE="137")[0] == 137  # the report is an old one
    assert "REQUEUE 7" not in job.steps


def test_a_job_that_slurm_restarted_too_often_ends(tmp_path):
    job = Job(tmp_path, "slurm.restarts=2")

    code, output = job.run(restart=3)

    assert code == 2
    assert "restarted 2 times already" in output
    assert not job.record.exists()


def test_a_faulty_server_ends_the_trainer_that_is_still_loading(tmp_path):
    job = Job(tmp_path)

    code, output = job.run(FAULTY="1", CHECKS="0.3", TRAINS="60")

    assert code == 2
    assert "a server of the fleet failed its check" in output


def test_running_servers_are_checked_before_the_ranks_start(tmp_path):
    job = Job(tmp_path, 'rollout.urls=["http://10.0.0.9:1"]')

    code, output = job.run(FAULTY="1")

    assert code == 2
    assert "a server of rollout.urls failed its check" in output
    assert steps_named(job, "train") == []


@pytest.mark.parametrize(("code", "restarted"), [(1, False), (130, False), (0, False)])
def test_an_ordinary_failure_is_not_requeued(tmp_path, code, restarted):
    job = Job(tmp_path, "slurm.preflight=false")

    assert job.run(CODE=str(code))[0] == code
    assert ("REQUEUE 7" in job.steps) == restarted


@pytest.mark.parametrize("code", [134, 137, 143])
def test_killed_ranks_are_requeued_after_a_step_unless_the_job_is_being_ended(tmp_path, code):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()
    steps = str(job.run_folder / "metrics.jsonl")

    assert job.run(CODE=str(code))[0] == code
    assert job.run(CODE=str(code), STEPS=steps, STATE="CANCELLED")[0] == code
    assert "REQUEUE 7" not in job.steps
    assert "ranks or servers were killed: the job is requeued" in job.run(CODE=str(code), STEPS=steps)[1]
    assert job.steps.count("REQUEUE 7") == 1
    assert job.run(1, CODE=str(code))[0] == code  # no step since the restart: the kill of the first start came late
    assert job.steps.count("REQUEUE 7") == 2


def test_a_fleet_lost_after_a_step_is_requeued(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()

    code, output = job.run(NO_FLEET="1", TRAINS="60", STEPS=str(job.run_folder / "metrics.jsonl"))

    assert code == 130
    assert "the fleet ended: the ranks finish their step" in output
    assert "REQUEUE 7" in job.steps, output


def test_a_finished_run_is_not_requeued_if_the_fleet_is_lost(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()

    code, output = job.run(NO_FLEET="1", TRAINS="60", STOPPED="0", STEPS=str(job.run_folder / "metrics.jsonl"))

    assert code == 0, output
    assert "the fleet ended: the ranks finish their step" in output
    assert "REQUEUE 7" not in job.steps


def test_a_run_folder_that_cannot_be_created_is_an_error(tmp_path):
    job = Job(tmp_path)
    job.run_folder.write_text("a file")

    done = subprocess.run(
        ["bash", str(job.script)],
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert f"cannot write {job.run_folder}: is it on a file system that every node sees?" in done.stdout
