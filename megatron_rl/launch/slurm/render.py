"""``megatron-rl slurm``: writes the batch script of a run to its run folder, and optionally submits it.

The script is plain bash that users can read, change and submit by hand. It starts one srun task per rank and one per
server; the ranks find the servers through the run folder. Source: Slurm's documentation of sbatch, srun and
heterogeneous jobs.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from megatron_rl.config.cluster import Slurm
from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.secret_settings import split_secrets, to_toml
from megatron_rl.config.sources import raise_problems
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.launch.versions import package_version
from megatron_rl.util.atomic import replace_text

JOB_BODY = Path(__file__).with_name("job.sh")
"""The part of the script that is the same for every job."""

JOB_TOP = Template("""\
#!/usr/bin/env bash
# A job of megatron-rl $version, rendered by
#   $command
# Submit it with sbatch; it may be edited first.

$header

cd $folder || exit 2
run=$run # the run folder, on a file system that every node sees
config=($config)
resume=$resume # 1: resume the run in the run folder; a requeued job always resumes
nodes_needed=$nodes ranks_per_node=$ranks_per_node cpus_per_rank=$cpus gpus_per_node=$gpus # of the trainer
servers=$servers
server_options=($server_options)
preflight=$preflight restarts=$restarts
# step MODULE ARGUMENTS... runs python -m MODULE with srun, in the container if there is one. The array "options" has
# srun's options. exec replaces the calling shell, so that a signal to a background step reaches srun.
step() { exec $step "$$@"; }

$setup

""")
"""The part of the script that depends on the run; ``$$`` is a dollar sign of bash."""

JOB = "job.sbatch"
"""File name of the script in the run folder."""

SECRETS = "secrets.toml"
"""File name of settings that may have secrets, in the run folder; only the user can read it."""

NEVER_STARTS = frozenset({"PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS"})
"""Pending reasons of Slurm for jobs that can never start."""

WATCH_SECONDS = 4.0
"""How long to watch a submitted job for such a reason."""

SET_BY_SCRIPT = ("train.resume=", "rollout.registry=")
"""Settings of the command line that the script sets at each start."""

PARALLEL_SIZES = ("tensor_parallel_size", "tp_size", "pipeline_parallel_size", "pp_size")
"""Options of SGLang and vLLM that determine how many GPUs share one model replica."""

REPLICA_SIZES = ("data_parallel_size", "dp_size")
"""Options that set the replicas per server, which have separate GPUs unless only attention is data-parallel."""

RESERVED_OPTIONS = (
    *("job-name", "output", "error", "open-mode", "signal", "time", "nodes", "ntasks", "ntasks-per-node"),
    *("cpus-per-task", "gpus-per-node", "gpus", "requeue", "no-requeue", "array"),
)
"""Options of sbatch that other settings decide, or that would break the script."""


def slurm(loaded: Loaded[Run], words: Sequence[str], *, submit: bool) -> int:
    """Write the script to the run folder, then print or submit it; return the exit code.

    Args:
        loaded: the configuration.
        words: config files and settings of the command line, which the job reads again.
        submit: whether to submit the script with sbatch.

    Raises:
        ConfigError: the run cannot work, or Slurm refuses the job.
    """
    if submit and shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on the PATH of this machine; run this on a login node, or leave out --submit")
    text = render(loaded, words, Path.cwd(), starts_here=submit)
    run = Path(loaded.run.log.path).absolute()
    try:
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        if secret := split_secrets(words)[1]:
            replace_text(run / SECRETS, to_toml(secret), mode=0o600)
        replace_text(run / JOB, text)
    except OSError as error:
        raise ConfigError(f"cannot write the run folder {run} (log.path): {error.strerror}") from error
    if not submit:
        sys.stdout.write(text)
        return 0
    job = _submit(run / JOB)
    sys.stdout.write(f"submitted job {job}: its log is {run}/slurm/job-{job}.log\n")
    return 0


def _submit(script: Path) -> str:
    """Submit a script and return the job number.

    Raises:
        ConfigError: Slurm refuses the job, or would never start it.
    """
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    # sbatch accepts a heterogeneous job that no partition can hold; it would stay pending.
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        queue = subprocess.run(["squeue", "-h", "-j", job, "-o", "%t %r"], capture_output=True, text=True, check=False)
        if reasons := NEVER_STARTS & set(queue.stdout.split()):
            subprocess.run(["scancel", job], check=False)
            raise ConfigError(
                f"Slurm would never start {script}: {', '.join(reasons)}; request less in [slurm] (nodes,"
                " rollout_nodes, time_limit), or another partition in slurm.options. The job was canceled"
            )
        if any(state != "PD" for state in queue.stdout.split()[::2]):
            break
        time.sleep(0.5)
    return job


def render(loaded: Loaded[Run], words: Sequence[str], folder: Path, *, starts_here: bool = True) -> str:
    """Return the batch script of a run; see ``slurm`` for the arguments.

    Without ``starts_here``, inputs of the run that are not on this machine are listed on stderr instead of refused.

    Raises:
        ConfigError: the run cannot work; the message lists all problems.
    """
    run, problems = loaded.run, list(_problems(loaded))
    raise_problems(problems)
    on_gloo = run.slurm.gpus_per_node == 0
    plan = make_plan(loaded, run.slurm.nodes * run.slurm.ranks, on_gloo=on_gloo, starts_here=starts_here)
    for missing in plan.missing:
        sys.stderr.write(f"not on this machine: {missing}\n")
    slurm, path = run.slurm, Path(run.log.path).absolute()
    public, secret = split_secrets(words)
    public += [str(path / SECRETS)] if secret else []
    filled = {
        "version": package_version("megatron-rl") or "?",
        "command": _printable(shlex.join(["megatron-rl", "slurm", *public])),
        "header": "\n".join(_header(run, path)),
        "folder": shlex.quote(str(folder)),
        "run": shlex.quote(str(path)),
        "config": shlex.join(word for word in public if not word.startswith(SET_BY_SCRIPT)),
        "resume": str(int(run.train.resume)),
        "setup": "\n".join(slurm.setup) or "# slurm.setup is empty",
        "step": " ".join(_step(slurm, path, folder)),
        "nodes": str(slurm.nodes),
        "ranks_per_node": str(slurm.ranks),
        "cpus": str(slurm.cpus_per_rank),
        "gpus": str(slurm.gpus_per_node),
        "servers": str(0 if run.rollout.urls else run.rollout.servers),
        "server_options": " ".join(server_options(run)),
        "preflight": str(int(slurm.preflight)),
        "restarts": str(slurm.restarts),
    }
    return JOB_TOP.substitute(filled) + JOB_BODY.read_text(encoding="utf-8")


def _printable(text: str) -> str:
    """Return a text for a comment of the script: characters that could end the line are written as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _server_gpus(loaded: Loaded[Run], gpus: int) -> Iterator[str]:
    """Yield a problem if the parallel size of a server is not the number of GPUs that it gets."""
    rollout = loaded.run.rollout
    if rollout.urls or not gpus or rollout.engine == "embedded":
        return
    options = rollout.sglang if rollout.engine == "sglang" else rollout.vllm
    names = PARALLEL_SIZES if options.get("enable_dp_attention") else (*PARALLEL_SIZES, *REPLICA_SIZES)
    sizes = {name: int(options[name]) for name in names if name in options}
    if (used := math.prod(sizes.values())) != gpus:
        settings = ", ".join(f"rollout.{rollout.engine}.{name} = {size}" for name, size in sizes.items())
        yield (
            f"a server gets {gpus} GPUs (slurm.gpus_per_node = {loaded.run.slurm.gpus_per_node}, rollout.servers ="
            f" {rollout.servers} on {loaded.run.slurm.rollout_nodes or loaded.run.slurm.nodes} nodes), but uses"
            f" {used} ({settings or 'no size is set'}); write rollout.{rollout.engine}.{PARALLEL_SIZES[0]} = {gpus}, or"
            " another number of servers"
        )


def servers_per_node(run: Run) -> int:
    """Return the number of servers per node."""
    return -(-run.rollout.servers // (run.slurm.rollout_nodes or run.slurm.nodes))


def _header(run: Run, path: Path) -> Iterator[str]:
    slurm = run.slurm
    options: dict[str, bool | int | str] = {
        "job-name": re.sub(r"[^\w.-]", "_", path.name),
        "output": str(path).replace("%", "%%") + "/slurm/job-%j.log",
        "open-mode": "append",
        "time": slurm.time_limit,
        "signal": f"B:USR1@{slurm.stop_seconds}",
        "requeue": True,
        "nodes": slurm.nodes + slurm.spare_nodes,
        "ntasks-per-node": slurm.ranks,
        "cpus-per-task": slurm.cpus_per_rank,
    }
    if slurm.gpus_per_node:
        options["gpus-per-node"] = slurm.gpus_per_node
    yield "# The trainer" if slurm.rollout_nodes or run.rollout.urls else "# The trainer and the fleet"
    yield from _directives({**options, **slurm.options})
    if slurm.rollout_nodes:
        yield "#SBATCH hetjob"
        yield "# The fleet"
        gpus = slurm.gpus_per_node
        fleet: dict[str, bool | int | str] = {
            "time": slurm.time_limit,
            "nodes": slurm.rollout_nodes,
            "ntasks-per-node": servers_per_node(run),
            "cpus-per-task": _server_cpus(run),
        }
        if gpus:
            fleet["gpus-per-node"] = gpus
        yield from _directives({**fleet, **slurm.options, **slurm.rollout_options})


def _directives(options: Mapping[str, bool | int | str]) -> Iterator[str]:
    for name, value in options.items():
        if value is not False:
            yield f"#SBATCH --{name.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}")


def server_options(run: Run) -> Iterator[str]:
    """Yield the options of srun that distribute the servers over their nodes."""
    per_node = servers_per_node(run)
    if not per_node or run.rollout.urls:
        return
    yield f"--nodes={-(-run.rollout.servers // per_node)}"
    yield f"--ntasks-per-node={per_node}"
    yield f"--cpus-per-task={_server_cpus(run)}"
    if run.slurm.gpus_per_node:
        yield f"--gpus-per-task={run.slurm.gpus_per_node // per_node}"


def _server_cpus(run: Run) -> int:
    return run.slurm.cpus_per_rank * max(run.slurm.gpus_per_node // servers_per_node(run), 1)


def _step(slurm: Slurm, run: Path, folder: Path) -> Iterator[str]:
    """Yield the start of a step's command: srun, the container if there is one, and python."""
    mounts = [*(f"{path}:{path}" for path in dict.fromkeys((str(run), str(folder)))), *slurm.mounts]
    yield 'srun --kill-on-bad-exit=1 --open-mode=append "${options[@]}"'
    if slurm.container == "pyxis":
        yield f"--container-image={shlex.quote(slurm.image)} --container-mounts={shlex.quote(','.join(mounts))}"
    if slurm.container == "apptainer":
        yield f"apptainer exec --nv --bind {shlex.quote(','.join(mounts))} {shlex.quote(slurm.image)}"
    yield f"{shlex.quote(slurm.python)} -m"


def _option_problems(loaded: Loaded[Run]) -> Iterator[str]:
    slurm = loaded.run.slurm
    for table in ("options", "rollout_options"):
        for name in getattr(slurm, table):
            if name.replace("_", "-") in RESERVED_OPTIONS:
                key = f"slurm.{table}.{name}"
                yield f"{key} ({loaded.origin(key)}) is decided by other settings of [slurm]; leave it out"
        for name, value in getattr(slurm, table).items():
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
                yield f"slurm.{table} has the name {name!r}; write the long name of an option of sbatch, without --"
            if not str(value).isprintable():
                yield f"slurm.{table}.{name} is {value!r}; write it without line breaks and control characters"


def _problems(loaded: Loaded[Run]) -> Iterator[str]:
    run, slurm = loaded.run, loaded.run.slurm
    yield from _option_problems(loaded)
    if run.rollout.urls and slurm.rollout_nodes:
        yield (
            f"{loaded.describe('slurm.rollout_nodes')}, but rollout.urls names servers that are already running;"
            " leave one of them out"
        )
    if slurm.rollout_nodes > run.rollout.servers > 0:
        yield (
            f"{loaded.describe('slurm.rollout_nodes')} is more than rollout.servers = {run.rollout.servers}: a server"
            " runs on one node, and the other nodes would idle; write slurm.rollout_nodes ="
            f" {run.rollout.servers}, or more servers"
        )
    gpus, per_node = slurm.gpus_per_node, servers_per_node(run)
    if slurm.rollout_nodes and gpus and per_node > gpus:
        yield (
            f"{loaded.describe('rollout.servers')} on {slurm.rollout_nodes} node(s) of {gpus} GPUs leaves less than one"
            f" GPU per server; write at most {gpus * slurm.rollout_nodes}"
        )
    yield from _server_gpus(loaded, gpus // per_node if per_node else 0)
    if not slurm.rollout_nodes and not run.rollout.urls and gpus:
        yield (
            f"{loaded.describe('slurm.rollout_nodes')} with slurm.gpus_per_node = {gpus}: servers would take the"
            " trainer's GPUs; write slurm.rollout_nodes = 1 or more, or rollout.urls"
        )
    for path in (os.fspath(Path(run.log.path).absolute()), *slurm.mounts):
        if re.search(r"[,\\]", path) or not path.isprintable():
            yield f"{path!r} has a comma, backslash or line break, which sbatch and mounts do not support; change it"
