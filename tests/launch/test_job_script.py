"""What the job's script does, run by bash with an srun and an scontrol that only say what they were asked."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.slurm.render import COMMON, render
from megatron_rl.observability.hang_watchdog import HUNG

ROOT = Path(__file__).parents[2]
PLAIN = ROOT / "launch" / "plain.sbatch"

SRUN = """#!/usr/bin/env bash
echo "$*" >> "$RECORD"
case "$*" in
    *" preflight judge "*) folder="$(sed 's/.*--folder \\([^ ]*\\) .*/\\1/' <<<"$*")"; mkdir -p "$folder"
                           echo n1 n2 > "$folder/nodes"; echo > "$folder/links" ;;
    *" preflight fleet "*) sleep "${ASKS:-0}"; exit "${UNFIT:-0}" ;;
    *" fleet --registry "*) folder="$(sed 's/.*--registry \\([^ ]*\\) .*/\\1/' <<<"$*")"
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
    """A rendered script in a folder with programs of its own."""

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
        """Return the exit code and what it said."""
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
        """What srun was asked, in order; no setting stands twice in a step, which would be refused."""
        steps = self.record.read_text().splitlines()
        for step in steps:
            settings = [word.partition("=")[0] for word in step.partition("megatron_rl")[2].split() if "=" in word]
            assert len(settings) == len(set(settings)), step
        return steps


def steps_named(job: Job, name: str) -> list[str]:
    return [step for step in job.steps if f"megatron_rl {name} " in step]


def test_the_plain_script_ends_with_the_text_of_every_job():
    text = PLAIN.read_text()

    assert text.endswith(COMMON.read_text()), "copy megatron_rl/launch/slurm/job.sh to the end of launch/plain.sbatch"
    assert text.count("From here on every job is the same") == 1
    subprocess.run(["bash", "-n", str(PLAIN)], check=True)


def test_the_plain_script_sets_all_that_a_rendered_one_sets(tmp_path):
    def names(text: str) -> set[str]:
        top = text.partition("# ---- From here on")[0]
        code = "\n".join(line.split(" # ")[0] for line in top.splitlines() if not line.startswith(("#", "step")))
        return {word.partition("=")[0] for word in code.split() if word.partition("=")[1] and word[0].isalpha()}

    rendered = names(Job(tmp_path, "slurm.rollout_nodes=1").script.read_text())
    wanted = {"run", "config", "resume", "nodes_needed", "ranks_per_node", "servers", "server_options", "restarts"}
    assert wanted <= names(PLAIN.read_text())
    assert wanted <= rendered


def test_a_job_looks_starts_trains_and_ends_in_this_order(tmp_path):
    job = Job(tmp_path)

    code, said = job.run()

    assert code == 0, said
    verbs = [step.partition("megatron_rl ")[2].split(" -")[0].split(" /")[0] for step in job.steps]
    assert verbs[:3] == ["preflight report", "preflight judge", "preflight link"]
    assert set(verbs[3:]) == {"fleet", "train", "preflight fleet"}
    assert "--nodelist=n1,n2" in steps_named(job, "train")[0]
    assert not any("--het-group" in step for step in job.steps)
    assert "train.resume=true" not in steps_named(job, "train")[0]
    assert steps_named(job, "train")[0].endswith(f"rollout.registry={tmp_path}/run/fleet/7.0/asked")
    assert steps_named(job, "preflight fleet")[0].endswith(f"rollout.registry={tmp_path}/run/fleet/7.0")
    assert (tmp_path / "run" / "fleet" / "7.0" / "end").exists()


def test_components_of_a_heterogeneous_job_get_their_own_steps(tmp_path):
    job = Job(tmp_path, "slurm.rollout_nodes=1")

    code, said = job.run(SLURM_HET_SIZE="2", SLURM_JOB_NODELIST_HET_GROUP_0="n", SLURM_JOB_NODELIST_HET_GROUP_1="n")

    assert code == 0, said
    groups = {step.partition("megatron_rl ")[2].split(" -")[0].split(" /")[0]: step.split()[2] for step in job.steps}
    assert groups.pop("fleet") == "--het-group=1"
    assert set(groups.values()) == {"--het-group=0"}


def test_a_hang_goes_back_into_the_queue_so_many_times_and_no_more(tmp_path):
    job = Job(tmp_path, "slurm.restarts=2", "slurm.preflight=false")

    for restart, requeues in ((0, 1), (1, 2), (2, 2)):
        code, said = job.run(restart, CODE=str(HUNG))
        assert code == HUNG
        assert job.steps.count("REQUEUE 7") == requeues, said
    assert "the ranks hung, see" in said
    assert "but the job was restarted 2 times already (slurm.restarts)" in said
    assert "train.resume=true" in steps_named(job, "train")[-1]


def test_a_rank_that_had_to_be_killed_after_the_report_is_a_hang_too(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")

    assert job.run(CODE="137", REPORT=str(job.run_folder / "hang"))[0] == HUNG
    assert "REQUEUE 7" in job.steps
    job.record.unlink()
    (job.run_folder / "hang" / "report.txt").touch()
    os.utime(job.run_folder / "hang" / "report.txt", (0, 0))
    assert job.run(CODE="137")[0] == 137  # the report is an old one
    assert "REQUEUE 7" not in job.steps


def test_a_job_that_slurm_itself_restarted_too_often_ends(tmp_path):
    job = Job(tmp_path, "slurm.restarts=2")

    code, said = job.run(restart=3)

    assert code == 2
    assert "restarted 2 times already" in said
    assert not job.record.exists()


def test_an_unfit_server_ends_the_trainer_that_is_still_loading(tmp_path):
    job = Job(tmp_path)

    code, said = job.run(UNFIT="1", ASKS="0.3", TRAINS="60")

    assert code == 2
    assert "a server of the fleet is not fit" in said


def test_servers_that_run_already_are_asked_before_the_ranks_start(tmp_path):
    job = Job(tmp_path, 'rollout.urls=["http://10.0.0.9:1"]')

    code, said = job.run(UNFIT="1")

    assert code == 2
    assert "a server of rollout.urls is not fit" in said
    assert steps_named(job, "train") == []


@pytest.mark.parametrize(("code", "restarted"), [(1, False), (130, False), (0, False)])
def test_a_failure_of_its_own_is_not_repeated(tmp_path, code, restarted):
    job = Job(tmp_path, "slurm.preflight=false")

    assert job.run(CODE=str(code))[0] == code
    assert ("REQUEUE 7" in job.steps) == restarted


@pytest.mark.parametrize("code", [137, 143])
def test_ranks_that_were_killed_go_on_if_they_had_made_a_step_and_the_job_is_not_being_ended(tmp_path, code):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()
    steps = str(job.run_folder / "metrics.jsonl")

    assert job.run(CODE=str(code))[0] == code
    assert job.run(CODE=str(code), STEPS=steps, STATE="CANCELLED")[0] == code
    assert "REQUEUE 7" not in job.steps
    assert "ranks or servers were killed: the job goes back" in job.run(CODE=str(code), STEPS=steps)[1]
    assert job.steps.count("REQUEUE 7") == 1
    assert job.run(1, CODE=str(code))[0] == code  # no step since the restart: the kill of the first start came late
    assert job.steps.count("REQUEUE 7") == 2


def test_a_fleet_that_is_lost_after_a_step_lets_the_job_go_on(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()

    code, said = job.run(NO_FLEET="1", TRAINS="60", STEPS=str(job.run_folder / "metrics.jsonl"))

    assert code == 130
    assert "the fleet ended: the ranks finish their step" in said
    assert "REQUEUE 7" in job.steps, said


def test_a_run_that_reached_its_end_is_over_though_the_fleet_was_lost(tmp_path):
    job = Job(tmp_path, "slurm.preflight=false")
    job.run_folder.mkdir()

    code, said = job.run(NO_FLEET="1", TRAINS="60", STOPPED="0", STEPS=str(job.run_folder / "metrics.jsonl"))

    assert code == 0, said
    assert "the fleet ended: the ranks finish their step" in said
    assert "REQUEUE 7" not in job.steps


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path):
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
