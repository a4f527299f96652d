"""Time of a weight push over links of equal speed: 1, 2, 4 servers and 1, 2 pipeline stages on hosts of their own.

    python -m benchmarks.shaped_push [--megabytes 50] [--megabits 200] [--servers 1 2 4] [--stages 1 2] [--repeats 3]

Needs root: hosts are network namespaces (``link_hosts.py``). Real embedded servers; every stage is a process of its own
on a host of its own, with half of the tensors if there are two. The figure is the time of a push over (bytes of the
model / speed of a link); pushes include checksums on both sides and the version, and every tensor changes. The
``distributed`` transport sends from the main rank, to which the second stage's rank sends its tensors first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import table
from benchmarks.link_hosts import LinkHosts
from benchmarks.weight_push import make_model
from megatron_rl.distributed.mesh import World
from megatron_rl.fleet.client import Client
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.rollout.stage_push import StageRank, stage_transport
from megatron_rl.weights.distributed import DistributedTransport

BUCKET_BYTES = 2 << 20
DISTRIBUTED_BUCKET_BYTES = 10 << 20
TIMEOUT_SECONDS = 120.0
PORT = 18100
CPU = torch.device("cpu")


def stage_tensors(
    tensors: Sequence[tuple[str, Tensor]], stage: int, stages: int, push: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield a stage's tensors, which differ from those of every other push."""
    for name, tensor in tensors[stage::stages]:
        yield name, tensor + push * 1e-3


def collected(tensors: Sequence[tuple[str, Tensor]], stages: int, push: int) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors on the main rank, to which the other stages send theirs."""
    yield from stage_tensors(tensors, 0, stages, push)
    for stage in range(1, stages):
        for name, tensor in tensors[stage::stages]:
            received = torch.empty_like(tensor)
            dist.recv(received, src=stage)
            yield name, received


def run_rank(args: argparse.Namespace) -> None:
    """Run one stage's rank; the main rank prints the seconds of every push as JSON."""
    world = World(args.rank, args.stage_count, CPU)
    dist.init_process_group("gloo", init_method=f"tcp://{args.main}:29555", rank=world.rank, world_size=world.size)
    tensors = sorted(load_file(args.model / "model.safetensors").items())
    transport = stage_transport(world, BUCKET_BYTES, Client, TIMEOUT_SECONDS, world.rank, world.size)
    seconds: dict[str, list[float]] = {"stages": [], "distributed": []}
    if world.rank:
        stage = StageRank(world, transport, is_sender=True)
        for push in range(1, args.repeats + 1):
            stage.push(stage_tensors(tensors, world.rank, world.size, 2 * push))
            for _, tensor in stage_tensors(tensors, world.rank, world.size, 2 * push + 1):
                dist.send(tensor, dst=0)
        return
    today = DistributedTransport(DISTRIBUTED_BUCKET_BYTES, "gloo", CPU, TIMEOUT_SECONDS)
    with Fleet.open(args.urls, transport, Timeouts(), keep_weights=False) as fleet:
        for push in range(1, args.repeats + 1):
            for name, used, sent in (
                ("stages", transport, stage_tensors(tensors, 0, world.size, 2 * push)),
                ("distributed", today, collected(tensors, world.size, 2 * push + 1)),
            ):
                fleet.sync.transport = used
                begun = time.perf_counter()
                report = fleet.update(sent, 2 * push + (name == "distributed"))
                seconds[name].append(time.perf_counter() - begun)
                if report.failed:
                    raise SystemExit(f"{name}: {report.failed}")
    print(json.dumps(seconds))


def measure(
    hosts: LinkHosts, urls: Sequence[str], stages: int, first_host: int, model: Path, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of pushes by transport."""
    ranks = []
    for rank in range(stages):
        words = [f"--rank={rank}", f"--stage-count={stages}", f"--main={hosts.address(first_host)}", f"--model={model}"]
        command = [sys.executable, "-m", "benchmarks.shaped_push", *words, f"--repeats={repeats}", "--urls", *urls]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(hosts.on(first_host + rank, command), env=environment, stdout=subprocess.PIPE, text=True)
        )
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank ended with {[rank.returncode for rank in ranks]}")
    return json.loads(outputs[0].splitlines()[-1])


def start_server(hosts: LinkHosts, host: int, model: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start an embedded server on a host."""
    words = ["-m", "megatron_rl.inference_server.serve", str(model), "--host", hosts.address(host), "--port", str(PORT)]
    with log.open("wb") as sink:
        return subprocess.Popen(hosts.on(host, [sys.executable, *words]), stdout=sink, stderr=subprocess.STDOUT)


def run_all(args: argparse.Namespace) -> None:
    """Measure all combinations and print the table as Markdown."""
    rows = []
    most_servers, most_stages = max(args.servers), max(args.stages)
    with (
        tempfile.TemporaryDirectory() as folder,
        LinkHosts(most_servers + most_stages, args.megabits, args.shaped) as hosts,
    ):
        model = Path(folder, "model")
        size = sum(tensor.nbytes for tensor in make_model(model, args.megabytes).values())
        link_seconds = size / (args.megabits * 1e6 / 8)
        print(
            f"{size / 1e6:.1f} MB, {link_seconds:.2f} s at {args.megabits:g} Mbit/s, shaped: {args.shaped}", flush=True
        )
        servers = [start_server(hosts, host, model, Path(folder, f"{host}.log")) for host in range(most_servers)]
        try:
            for stages in args.stages:
                for count in args.servers:
                    urls = [f"http://{hosts.address(host)}:{PORT}" for host in range(count)]
                    found = measure(hosts, urls, stages, most_servers, model, args.repeats)
                    figures = {name: [value / link_seconds for value in values] for name, values in found.items()}
                    rows.append(
                        [str(stages), str(count)]
                        + [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in figures.values()]
                    )
                    print(rows[-1], flush=True)
        finally:
            for server in servers:
                server.kill()
                server.wait()
    print(table(["stages", "servers", "stages", "distributed"], rows))


def main() -> None:
    """Measure, or run one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--megabits", type=float, default=200)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shaped", choices=["sent", "both"], default="sent")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage-count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--main", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--urls", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_all(args) if args.rank is None else run_rank(args)


if __name__ == "__main__":
    main()
