"""The first steps of a Slurm job: check every node, compare the nodes, and test the links between them.

Run by the job script as ``python -m megatron_rl.launch.slurm.preflight STEP``:

    report   on every node: writes a description of the node to a file in the run folder; nodes do not wait for others
    judge    on one node: reads the files, prints a table, names faulty nodes, and selects as many good ones as needed
    link     on every rank of the selected nodes: all-reduce and all-to-all, checked and timed
    fleet    on the first trainer node: one short request to every server (``fleet_check``)

A node without a file is down or does not see the run folder. ``megatron-rl check --cluster`` runs all four steps in an
allocation.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megatron_rl.config.load import to_json
from megatron_rl.config.schema import Run, load_run
from megatron_rl.distributed.links import free_gpu_bytes, measure_links
from megatron_rl.errors import TrainingError
from megatron_rl.launch.planning.attention import attention_problems
from megatron_rl.launch.planning.layout import layout_of
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.launch.planning.run_plan import batch_sizes
from megatron_rl.launch.slurm.fleet_check import check_fleet
from megatron_rl.launch.versions import found_versions
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.policy.engine_attention import why_not_asked
from megatron_rl.util.atomic import replace_text
from megatron_rl.util.console import make_console
from megatron_rl.util.exit_codes import interrupt_on_sigterm, run_command

WAIT_SECONDS = 15.0
"""How long ``judge`` waits for the files, which a shared file system may show late."""

MAX_CLOCK_SECONDS = 5.0
"""Largest accepted clock difference; with a larger one the times in logs are misleading."""

LINK_TIMEOUT_SECONDS = 60.0

COMPARED = ("config", "python", "torch", "megatron-core", "cuda", "driver", "gpus", "machine")
"""Facts that must be equal on all nodes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; return its exit code."""
    parser = argparse.ArgumentParser(prog="preflight", description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("report", "judge", "link", "fleet"):
        step = steps.add_parser(name)
        if name != "fleet":
            step.add_argument("--folder", type=Path, required=True, help="folder of the results")
        if name in ("report", "fleet"):
            step.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE")
        if name == "judge":
            step.add_argument("--nodes", nargs="+", required=True, help="names of the nodes")
            step.add_argument("--needed", type=int, required=True, help="number of nodes that the run needs")
    options = parser.parse_args(argv)
    interrupt_on_sigterm()
    return run_command(f"preflight {options.step}", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.step == "report":
        return report(load_run(options.config).run, options.folder)
    if options.step == "judge":
        return judge(options.folder, options.nodes, options.needed)
    if options.step == "link":
        return link(options.folder, LINK_TIMEOUT_SECONDS)
    return check_fleet(load_run(options.config).run)


def report(run: Run, folder: Path) -> int:
    """Write the description of this node; return 0 even if the node has problems, which ``judge`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    versions = found_versions()
    facts: dict[str, object] = {
        "node": node,
        "problems": list(_node_problems(run)),
        "config": hashlib.sha256(to_json(run).encode()).hexdigest()[:12],
        "clock_seconds": _clock_difference(folder),
        "driver": _driver(),
        "free_gpu_bytes": free_gpu_bytes(),
        **{name: versions.get(name) for name in ("python", "torch", "megatron-core", "cuda", "gpus", "machine")},
    }
    replace_text(folder / f"{node}.json", json.dumps(facts, indent=1) + "\n")
    return 0


def _node_problems(run: Run) -> Iterator[str]:
    """Yield the problems that this node finds without comparing it with others."""
    if (Path(run.model.path) / "config.json").is_file():
        yield from _attention_problems(run)
    else:
        yield f"does not see the model {run.model.path}"
    folder = Path(run.log.path)
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("written\n")
        probe.unlink()
    except OSError as error:
        yield f"cannot write to the run folder {folder}: {error.strerror}"
    try:
        with socket.socket() as listening:
            listening.bind(("", 0))
    except OSError as error:
        yield f"cannot open a port: {error.strerror}"


def _attention_problems(run: Run) -> Iterator[str]:
    if why_not_asked() is not None:
        return
    layout = layout_of(run.parallel, None, run.model.megatron)
    sizes = model_sizes(family_of(read_hf_config(Path(run.model.path))))
    yield from attention_problems(run, layout, sizes, batch_sizes(run, layout).longest)


def _clock_difference(folder: Path) -> float:
    """Return the seconds that this node's clock is ahead of the file system's."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    probe.write_text("")
    difference = time.time() - probe.stat().st_mtime
    probe.unlink()
    return difference


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().split("\n", 1)[0] if path.exists() else None


def judge(folder: Path, nodes: Sequence[str], needed: int, wait_seconds: float = WAIT_SECONDS) -> int:
    """Print the table of nodes and write the selected ones to the file ``nodes``; return 0 if there are enough, else 1.

    Args:
        folder: folder of the nodes' files.
        nodes: names of the nodes of the allocation.
        needed: number of nodes that the trainer needs.
        wait_seconds: how long to wait for files.
    """
    files = {node: folder / f"{node}.json" for node in nodes}
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline and not all(file.exists() for file in files.values()):
        time.sleep(0.2)
    facts = {node: json.loads(file.read_text()) for node, file in files.items() if file.exists()}
    problems = find_problems(facts, nodes, folder)
    make_console().print(_table(facts, problems))
    good = [node for node in nodes if not problems[node]]
    for node in nodes:
        for problem in problems[node]:
            sys.stdout.write(f"preflight: {node} {problem}\n")
    if len(good) < needed:
        sys.stdout.write(
            f"preflight: {needed} nodes are needed and {len(good)} of {len(nodes)} are good; the job stops before the"
            " model is loaded. With slurm.spare_nodes a job can continue without faulty nodes\n"
        )
        return 1
    replace_text(folder / "nodes", " ".join(good[:needed]) + "\n")
    return 0


def find_problems(
    facts: Mapping[str, Mapping[str, object]], nodes: Sequence[str], folder: Path
) -> dict[str, list[str]]:
    """Return the problems of each node; a fact that differs from most nodes is a problem."""
    found: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        if node not in facts:
            found[node].append(f"wrote no report to {folder}: it is down, or does not share the run folder (log.path)")
            continue
        problems = facts[node]["problems"]
        assert isinstance(problems, list)
        found[node] += [str(problem) for problem in problems]
        if abs(offset := float(str(facts[node]["clock_seconds"]))) > MAX_CLOCK_SECONDS:
            found[node].append(f"has a clock that differs by {offset:+.0f} s from the run folder's file system")
    for name in COMPARED:
        values = Counter(str(facts[node][name]) for node in nodes if node in facts)
        usual = values.most_common(1)[0][0] if values else ""
        for node in nodes:
            if node in facts and str(facts[node][name]) != usual:
                found[node].append(f"has {name} {facts[node][name]}, the others have {usual}")
    return found


def _table(facts: Mapping[str, Mapping[str, object]], problems: Mapping[str, Sequence[str]]) -> Table:
    columns = ("node", "verdict", "gpus", "free GPU GB", "cuda", "driver", "torch", "megatron-core", "python", "config")
    table = Table(*columns, title="Preflight", title_justify="left")
    for node, node_problems in problems.items():
        known = facts.get(node, {})
        free = known.get("free_gpu_bytes")
        gigabytes = " ".join(f"{value / 1e9:.0f}" for value in free) if isinstance(free, list) else ""
        versions = [str(known.get(name) or "-")[:24] for name in columns[4:]]
        verdict = "faulty" if node_problems else "ok"
        table.add_row(node, verdict, str(known.get("gpus") or "-"), gigabytes, *versions)
    return table


def link(folder: Path, timeout_seconds: float) -> int:
    """Check and time collectives over all ranks; the first rank writes the result to the file ``links``.

    Raises:
        TrainingError: the ranks cannot connect, or a collective failed or returned wrong values.
    """
    try:
        text = measure_links(timeout_seconds)
    except TrainingError:
        raise
    except RuntimeError as error:  # torch has no narrower type for connections that gloo or NCCL cannot open
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
        name, master = socket.gethostname(), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingError(
            f"the ranks cannot connect to each other from {name}, with rank 0 at {master} and the network interface"
            f" {interface or 'of the host name'}: {str(error).splitlines()[0]}; write the interface that reaches the"
            " other nodes in slurm.setup: export GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME (ip -brief address"
            " lists them)"
        ) from error
    if text is not None:
        replace_text(folder / "links", text)
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
