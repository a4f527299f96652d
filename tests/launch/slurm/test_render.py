"""The rendered script of a job: its directives, its commands, and what is refused."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.launch.slurm.render import _server_gpus, render

DEMO = Path(__file__).parents[3] / "configs" / "demo.toml"
TWO_NODES = ("slurm.nodes=2", "slurm.gpus_per_node=0")
"""Used unless a test sets them."""


def script(tmp_path: Path, *settings: str) -> str:
    given = {setting.partition("=")[0] for setting in settings}
    words = [f"log.path={tmp_path / 'run'}", *settings]
    words += [word for word in TWO_NODES if word.partition("=")[0] not in given]
    text = render(load(Run, [str(DEMO)], words), [str(DEMO), *words], tmp_path)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.processes
def test_trainer_and_fleet_are_components_with_separate_nodes(tmp_path):
    text = script(
        tmp_path,
        "slurm.gpus_per_node=8",
        "slurm.rollout_nodes=2",
        "rollout.servers=4",
        "slurm.options={ partition = 'h100', exclusive = true }",
        "slurm.rollout_options={ partition = 'l40' }",
    )

    trainer, fleet = " ".join(directives(text)).split(" hetjob ")
    assert "--nodes=2 --ntasks-per-node=8 " in trainer
    assert trainer.endswith("--gpus-per-node=8 --partition=h100 --exclusive")
    assert "--time=24:00:00 --nodes=2 --ntasks-per-node=2 --cpus-per-task=32 --gpus-per-node=8 --partition=l40" in fleet
    assert "server_options=(--nodes=2 --ntasks-per-node=2 --cpus-per-task=32 --gpus-per-task=4)" in text


@pytest.mark.processes
def test_servers_share_the_trainer_s_nodes_or_are_already_running(tmp_path):
    together, connected = script(tmp_path), script(tmp_path, 'rollout.urls=["http://10.0.0.7:30000"]')

    assert "hetjob" not in together + connected
    assert "servers=1\n" in together
    assert "servers=0\n" in connected


@pytest.mark.processes
def test_the_stop_signal_comes_before_the_time_limit_and_the_log_is_appended(tmp_path):
    found = directives(script(tmp_path, "slurm.stop_seconds=600", "slurm.time_limit=2-00:00:00"))

    assert {"--signal=B:USR1@600", "--time=2-00:00:00", "--requeue", "--open-mode=append"} <= set(found)


@pytest.mark.processes
def test_steps_run_in_the_configured_container(tmp_path):
    run = tmp_path / "run"
    mounts = f"{run}:{run},{tmp_path}:{tmp_path},/data:/data"
    settings = ("slurm.image=train.sqsh", 'slurm.mounts=["/data:/data"]', "slurm.python=python3")

    pyxis = script(tmp_path, "slurm.container=pyxis", *settings)
    apptainer = script(tmp_path, "slurm.container=apptainer", *settings)

    assert f"--container-image=train.sqsh --container-mounts={mounts} python3 -m " in pyxis
    assert f"apptainer exec --nv --bind {mounts} train.sqsh python3 -m " in apptainer


@pytest.mark.processes
def test_settings_with_blanks_and_dollars_reach_the_job_unchanged(tmp_path):
    text = script(tmp_path, "rollout.sglang={ A = 'x $y' }")

    (line,) = [line for line in text.splitlines() if line.startswith("config=(")]
    output = subprocess.run(["bash", "-c", f'{line}; printf "%s\\n" "${{config[@]}}"'], capture_output=True, text=True)
    assert "rollout.sglang={ A = 'x $y' }" in output.stdout.splitlines()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("slurm.options={ nodes = 3 }", r"slurm.options.nodes \(command line.*is decided by other settings"),
        ("slurm.nodes=3", r"6 ranks|3 ranks cannot be divided"),
        ("slurm.gpus_per_node=8", r"servers would take the trainer's GPUs; write slurm.rollout_nodes"),
        ("slurm.rollout_nodes=2", r"more than rollout.servers = 1: a server runs on one node"),
        ("slurm.image=x", r"container is 'none' and image 'x'; write both"),
        ("slurm.time_limit=soon", r"slurm.time_limit"),
    ],
)
def test_impossible_jobs_are_refused(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        script(tmp_path, setting)


@pytest.mark.parametrize(
    ("engine", "options", "fits"),
    [
        ("vllm", "{ tensor_parallel_size = 4 }", True),
        ("vllm", "{ tensor_parallel_size = 2, pipeline_parallel_size = 2 }", True),
        ("vllm", "{ tensor_parallel_size = 2, data_parallel_size = 2 }", True),
        ("sglang", "{ tp_size = 4, dp_size = 4, enable_dp_attention = true }", True),
        ("vllm", "{ tensor_parallel_size = 8 }", False),
        ("vllm", "{}", False),
    ],
)
def test_the_parallel_size_of_a_server_must_be_its_number_of_gpus(tmp_path, engine, options, fits):
    run = load(Run, [str(DEMO)], [f"rollout.engine={engine}", f"rollout.{engine}={options}", "rollout.servers=4"])
    given = run.run.slurm.model_copy(update={"nodes": 2, "rollout_nodes": 2, "gpus_per_node": 8})
    loaded = replace(run, run=run.run.model_copy(update={"slurm": given}))

    problems = list(_server_gpus(loaded, 4))

    assert len(problems) == (not fits)
    assert fits or "a server gets 4 GPUs (slurm.gpus_per_node = 8, rollout.servers = 4 on 2 nodes)" in problems[0]


def test_a_run_folder_that_cannot_be_created_is_an_error_before_submission(tmp_path, capsys):
    (tmp_path / "file").touch()

    assert main(["slurm", str(DEMO), *TWO_NODES, f"log.path={tmp_path / 'file' / 'run'}"]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err


def test_only_submission_needs_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [str(DEMO), *TWO_NODES, f"log.path={tmp_path / 'run'}"]

    assert main(["slurm", *words, "--dry-run"]) == 0
    assert (tmp_path / "run" / "job.sbatch").read_text() == capsys.readouterr().out
    assert main(["slurm", *words, "--submit"]) == 2
    assert "sbatch is not on the PATH of this machine" in capsys.readouterr().err
