"""``megatron-rl check --cluster``: runs the preflight by hand, inside salloc or a job."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import NODES
from megatron_rl.errors import ConfigError
from megatron_rl.fleet.registry import END
from megatron_rl.launch.slurm.preflight import judge
from megatron_rl.launch.slurm.render import server_options

END_SECONDS = 60.0
"""How long the servers may take to exit."""


def check_cluster(words: Sequence[str], run: Run) -> int:
    """Run the preflight in the surrounding allocation; return the exit code.

    Unless the run uses running servers, a fleet is started for the check, on the second component of a heterogeneous
    allocation or else on the trainer's nodes, and ended afterwards.

    Raises:
        ConfigError: there is no allocation.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("check --cluster checks the nodes of a Slurm allocation: run it inside salloc or a job")
    heterogeneous = int(os.environ.get("SLURM_HET_SIZE", "1")) > 1
    groups = [os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{i}"] for i in (0, 1)] if heterogeneous else []
    nodelists = groups or [os.environ["SLURM_JOB_NODELIST"]]
    names = _output("scontrol", "show", "hostnames", nodelists[0]).split()
    addresses = [pair for nodelist in nodelists for pair in _addresses(nodelist)]
    folder = Path(run.log.path).absolute() / "slurm" / f"preflight-{os.environ['SLURM_JOB_ID']}-{int(time.time())}"
    folder.mkdir(parents=True)
    preflight = [run.slurm.python, "-m", "megatron_rl.launch.slurm.preflight"]
    on_trainer = ["srun", "--overlap", *(["--het-group=0"] if heterogeneous else [])]
    on_trainer += [f"--cpus-per-task={run.slurm.cpus_per_rank}"]
    on_trainer += [f"--gpus-per-node={run.slurm.gpus_per_node}"] if run.slurm.gpus_per_node else []
    on_fleet = ["srun", "--overlap", *(["--het-group=1"] if heterogeneous else [])]

    nodes = [*on_trainer, f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1"]
    report = [*preflight, "report", "--folder", str(folder), *words]
    subprocess.run([*nodes, "--kill-on-bad-exit=0", "--time=5", *report], check=False)
    if judge(folder, names, min(run.slurm.nodes, len(names))):
        return 1
    selected = (folder / "nodes").read_text().split()
    environment = os.environ | {
        NODES: " ".join(addresses),
        "MASTER_ADDR": dict(pair.split("=", 1) for pair in addresses)[selected[0]],
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }
    ranks = [*on_trainer, f"--nodes={len(selected)}", f"--nodelist={','.join(selected)}"]
    ranks += [f"--ntasks={len(selected) * run.slurm.ranks}", f"--ntasks-per-node={run.slurm.ranks}"]
    link = [*ranks, *preflight, "link", "--folder", str(folder)]
    if code := subprocess.run(link, env=environment, check=False).returncode:
        return code
    first_node = [*on_trainer, "--nodes=1", "--ntasks=1", f"--nodelist={selected[0]}"]
    check = [*first_node, *preflight, "fleet", *words]
    with ExitStack() as stack:
        if not run.rollout.urls:
            registry = folder / "fleet"
            registry.mkdir()
            command = [*on_fleet, *server_options(run), f"--ntasks={run.rollout.servers}", "--kill-on-bad-exit=0"]
            command += [
                f"--output={str(folder).replace('%', '%%')}/server-%t.log",
                run.slurm.python,
                "-m",
                "megatron_rl.launch.slurm.serve_node",
            ]
            command += ["--registry", str(registry), *words]
            stack.callback(_end, subprocess.Popen(command, env=environment), registry)
            check += [f"rollout.registry={registry}"]
        sys.stdout.flush()
        return subprocess.run(check, env=environment, check=False).returncode


def _end(fleet: subprocess.Popen[bytes], registry: Path) -> None:
    (registry / END).touch()
    try:
        fleet.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        fleet.terminate()
        fleet.wait()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _addresses(nodelist: str) -> list[str]:
    """Return ``node=address`` of every node, with the address that Slurm uses."""
    text = _output("scontrol", "show", "node", nodelist, "--oneliner")
    return ["=".join(pair) for pair in re.findall(r"^NodeName=(\S+) .*? NodeAddr=(\S+)", text, re.MULTILINE)]
