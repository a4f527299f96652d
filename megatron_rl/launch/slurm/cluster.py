"""``megatron-rl check --cluster``: the preflight by hand, in an allocation of salloc or inside a job."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.servers import END
from megatron_rl.launch.slurm.preflight import judge
from megatron_rl.launch.slurm.render import server_options
from megatron_rl.launch.slurm.serve_node import NODES

END_SECONDS = 60.0
"""How long servers may take to end."""


def check_cluster(words: Sequence[str], run: Run) -> int:
    """Run the preflight in the allocation that this process is in; return the exit code.

    A fleet of the run's own is started for it, on the second component of a heterogeneous allocation or else on the
    trainer's nodes, and ended again.

    Raises:
        ConfigError: there is no allocation.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("check --cluster looks at the nodes of a Slurm allocation: run it inside salloc or a job")
    split = int(os.environ.get("SLURM_HET_SIZE", "1")) > 1
    groups = [os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{i}"] for i in (0, 1)] if split else []
    nodelists = groups or [os.environ["SLURM_JOB_NODELIST"]]
    names = _said("scontrol", "show", "hostnames", nodelists[0]).split()
    addresses = [pair for nodelist in nodelists for pair in _addresses(nodelist)]
    folder = Path(run.log.path).absolute() / "slurm" / f"preflight-{os.environ['SLURM_JOB_ID']}-{int(time.time())}"
    folder.mkdir(parents=True)
    program = [run.slurm.python, "-m", "megatron_rl"]
    on_trainer = ["srun", "--overlap", *(["--het-group=0"] if split else [])]
    on_trainer += [f"--cpus-per-task={run.slurm.cpus_per_rank}"]
    on_trainer += [f"--gpus-per-node={run.slurm.gpus_per_node}"] if run.slurm.gpus_per_node else []
    on_fleet = ["srun", "--overlap", *(["--het-group=1"] if split else [])]

    nodes = [*on_trainer, f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1"]
    report = [*program, "preflight", "report", "--folder", str(folder), *words]
    subprocess.run([*nodes, "--kill-on-bad-exit=0", "--time=5", *report], check=False)
    if judge(folder, names, min(run.slurm.nodes, len(names))):
        return 1
    chosen = (folder / "nodes").read_text().split()
    environment = os.environ | {
        NODES: " ".join(addresses),
        "MASTER_ADDR": dict(pair.split("=", 1) for pair in addresses)[chosen[0]],
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }
    ranks = [*on_trainer, f"--nodes={len(chosen)}", f"--nodelist={','.join(chosen)}"]
    ranks += [f"--ntasks={len(chosen) * run.slurm.ranks}", f"--ntasks-per-node={run.slurm.ranks}"]
    link = [*ranks, *program, "preflight", "link", "--folder", str(folder)]
    if code := subprocess.run(link, env=environment, check=False).returncode:
        return code
    one = [*on_trainer, "--nodes=1", "--ntasks=1", f"--nodelist={chosen[0]}", *program, "preflight", "fleet", *words]
    return _ask([*on_fleet, *server_options(run)], [*program, "fleet", *words], one, folder, environment, run)


def _ask(
    on_fleet: Sequence[str],
    server: Sequence[str],
    question: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    run: Run,
) -> int:
    """Ask the servers that run already, or start the run's own for it; return the exit code."""
    with ExitStack() as stack:
        if not run.rollout.urls:
            registry = folder / "fleet"
            registry.mkdir()
            output = [f"--ntasks={run.rollout.servers}", "--kill-on-bad-exit=0", f"--output={folder}/server-%t.log"]
            command = [*on_fleet, *output, *server, "--registry", str(registry)]
            stack.callback(_end, subprocess.Popen(command, env=environment), registry)
            question = [*question, f"rollout.registry={registry}"]
        sys.stdout.flush()
        return subprocess.run(question, env=environment, check=False).returncode


def _end(fleet: subprocess.Popen[bytes], registry: Path) -> None:
    (registry / END).touch()
    try:
        fleet.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        fleet.terminate()
        fleet.wait()


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _addresses(nodelist: str) -> list[str]:
    """Return ``node=address`` of every node, as Slurm itself reaches it."""
    said = _said("scontrol", "show", "node", nodelist, "--oneliner")
    return ["=".join(pair) for pair in re.findall(r"^NodeName=(\S+) .*? NodeAddr=(\S+)", said, re.MULTILINE)]
