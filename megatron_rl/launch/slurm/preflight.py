"""The first steps of a Slurm job: is every node fit, are they alike, and do they reach each other.

    report   on every node: writes what it is to a file in the run folder. No rank waits for another
    judge    on one node: reads the files, prints a table, names odd nodes, chooses as many good ones as are needed
    link     on every rank of the chosen nodes: all-reduce and all-to-all, checked and timed
    fleet    from the first trainer node: a short request to every server (``roundtrip``)

A node whose file does not come is down, or does not see the run folder. ``megatron-rl check --cluster`` runs all four
in an allocation; the script of ``megatron-rl slurm`` has them as its first steps.
"""

import hashlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.config.load import to_json
from megatron_rl.config.schema import Run
from megatron_rl.distributed.links import free_gpu_bytes, measure_links
from megatron_rl.observability.versions import found_versions
from megatron_rl.util.atomic import replace_text

WAIT_SECONDS = 15.0
"""How long the judge waits for files: the nodes have written them, but a shared file system may show them late."""

CLOCK_SECONDS = 5.0
"""Clocks may differ by this much; more, and the times in logs mislead."""

SAME = ("config", "python", "torch", "megatron-core", "cuda", "driver", "gpus", "machine")
"""What must be the same on all nodes."""


def report(run: Run, folder: Path) -> int:
    """Write what this node is; return 0 whatever it is: the judge decides."""
    folder.mkdir(parents=True, exist_ok=True)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problems = list(_own_problems(run))
    versions = found_versions()
    facts: dict[str, object] = {
        "node": node,
        "problems": problems,
        "config": hashlib.sha256(to_json(run).encode()).hexdigest()[:12],
        "clock_seconds": _clock_difference(folder),
        "driver": _driver(),
        "free_gpu_bytes": free_gpu_bytes(),
        **{name: versions.get(name) for name in ("python", "torch", "megatron-core", "cuda", "gpus", "machine")},
    }
    replace_text(folder / f"{node}.json", json.dumps(facts, indent=1) + "\n")
    return 0


def _own_problems(run: Run) -> Iterator[str]:
    """Yield what this node alone can see to be wrong."""
    if not (Path(run.model.path) / "config.json").is_file():
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


def _clock_difference(folder: Path) -> float:
    """Return this node's time less that of the file system, in seconds."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    probe.write_text("")
    difference = time.time() - probe.stat().st_mtime
    probe.unlink()
    return difference


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().split("\n", 1)[0] if path.exists() else None


def judge(folder: Path, nodes: Sequence[str], needed: int, wait_seconds: float = WAIT_SECONDS) -> int:
    """Print the table, write the chosen nodes to ``nodes``; return 0 if there are enough, else 1.

    Args:
        folder: where the nodes have written their files.
        nodes: of the allocation.
        needed: how many the trainer has ranks for.
        wait_seconds: how long to wait for files.
    """
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline and not all((folder / f"{node}.json").exists() for node in nodes):
        time.sleep(0.2)
    facts = {node: json.loads((folder / f"{node}.json").read_text()) for node in nodes if _has(folder, node)}
    verdicts = verdicts_on(facts, nodes, folder)
    Console(highlight=False, width=160).print(_table(facts, verdicts))
    good = [node for node in nodes if not verdicts[node]]
    for node in nodes:
        for problem in verdicts[node]:
            sys.stdout.write(f"preflight: {node} {problem}\n")
    if len(good) < needed:
        sys.stdout.write(
            f"preflight: {needed} nodes are needed and {len(good)} of {len(nodes)} are fit; the job stops before the"
            " model is loaded. slurm.spare_nodes lets a job go on without odd nodes\n"
        )
        return 1
    replace_text(folder / "nodes", " ".join(good[:needed]) + "\n")
    return 0


def _has(folder: Path, node: str) -> bool:
    return (folder / f"{node}.json").exists()


def verdicts_on(facts: Mapping[str, Mapping[str, object]], nodes: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Return for each node what is wrong with it; what differs from most nodes is odd."""
    found: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        if node not in facts:
            found[node].append(f"wrote no report to {folder}: it is down, or does not share the run folder (log.path)")
            continue
        problems = facts[node]["problems"]
        assert isinstance(problems, list)
        found[node] += [str(problem) for problem in problems]
    for name in SAME:
        values = Counter(str(facts[node][name]) for node in nodes if node in facts)
        usual = values.most_common(1)[0][0] if values else ""
        for node in nodes:
            if node in facts and str(facts[node][name]) != usual:
                found[node].append(f"has {name} {facts[node][name]}, the others have {usual}")
    for node in nodes:
        if node in facts and abs(off := float(str(facts[node]["clock_seconds"]))) > CLOCK_SECONDS:
            found[node].append(f"has a clock that is {off:+.0f} s off that of the run folder's file system")
    return found


def _table(facts: Mapping[str, Mapping[str, object]], verdicts: Mapping[str, Sequence[str]]) -> Table:
    columns = ("node", "verdict", "gpus", "free GPU GB", "cuda", "driver", "torch", "megatron-core", "python", "config")
    table = Table(*columns, title="Preflight", title_justify="left")
    for node, problems in verdicts.items():
        known = facts.get(node, {})
        free = known.get("free_gpu_bytes")
        gigabytes = " ".join(f"{value / 1e9:.0f}" for value in free) if isinstance(free, list) else ""
        shown = [
            str(known.get(name) or "-") for name in ("cuda", "driver", "torch", "megatron-core", "python", "config")
        ]
        table.add_row(
            node, "odd" if problems else "ok", str(known.get("gpus") or "-"), gigabytes, *(v[:24] for v in shown)
        )
    return table


def link(folder: Path, timeout_seconds: float) -> int:
    """Check and time collectives over all ranks; the first rank writes the result to ``links``."""
    text = measure_links(timeout_seconds)
    if text is not None:
        replace_text(folder / "links", text)
        sys.stdout.write(text)
    return 0
