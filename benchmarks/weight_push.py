"""Time of a weight push by transport and model size, compared with a plain copy of the same bytes.

    python benchmarks/weight_push.py [--megabytes 5 50] [--repeats 3]

Real embedded servers on this machine, random Qwen3-MoE models in float32. The plain copy reads the model's file and
writes it once. Times are the best of the repeats; transports take turns. A push includes pausing (no request runs),
checksums on both sides, setting the version, and flushing.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import table
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import embedded_server
from megatron_rl.weights.disk import DiskTransport
from megatron_rl.weights.distributed import DistributedTransport
from megatron_rl.weights.ipc import IpcTransport
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import WeightTransport

BUCKET_BYTES = 16 << 20


def make_model(folder: Path, megabytes: int) -> dict[str, Tensor]:
    """Write a random model of about this size; return its tensors."""
    torch.manual_seed(0)
    hidden, layers, experts = 256, 4, 8
    # 3 matrices per expert, 4 bytes per number
    width = max(32, megabytes * (1 << 20) // (layers * experts * 3 * hidden * 4) // 32 * 32)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        max_position_embeddings=256,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def transports(folder: Path, model: Path) -> dict[str, WeightTransport]:
    """Return one transport of each kind."""
    return {
        "tensor": TensorTransport(BUCKET_BYTES),
        "disk": DiskTransport(BUCKET_BYTES, folder / "weights", model),
        "distributed (gloo)": DistributedTransport(BUCKET_BYTES, "gloo", torch.device("cpu")),
        "ipc": IpcTransport(BUCKET_BYTES, torch.device("cpu")),
    }


def copy_seconds(source: Path, target: Path) -> float:
    """Return the seconds of a plain copy of the model's file."""
    begun = time.perf_counter()
    shutil.copyfile(source, target)
    return time.perf_counter() - begun


def measure(megabytes: int, servers: int, repeats: int, folder: Path) -> dict[str, object]:
    """Return the best times for one model size."""
    model = folder / f"model-{megabytes}"
    tensors = make_model(model, megabytes)
    processes = [embedded_server(str(model), folder / f"log-{megabytes}-{n}") for n in range(servers)]
    kinds = transports(folder, model)
    best: dict[str, float] = dict.fromkeys([*kinds, "plain copy"], float("inf"))
    with Fleet.open(processes, kinds["tensor"], Timeouts(), keep_weights=False) as fleet:
        version = 0
        for _ in range(repeats):
            best["plain copy"] = min(best["plain copy"], copy_seconds(model / "model.safetensors", folder / "copy"))
            for name, transport in kinds.items():
                version += 1
                fleet.sync.transport = transport
                begun = time.perf_counter()
                report = fleet.update(fresh(tensors.items()), version)
                best[name] = min(best[name], time.perf_counter() - begun)
                if report.failed:
                    raise SystemExit(f"{name}: {report.failed}")
    return {"bytes": sum(tensor.nbytes for tensor in tensors.values()), "servers": servers, "seconds": best}


def fresh(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Yield copies of the tensors, as a trainer's export does."""
    for name, tensor in tensors:
        yield name, tensor.clone()


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            for servers in args.servers:
                found = measure(megabytes, servers, args.repeats, Path(folder))
                results.append(found)
                seconds = found["seconds"]
                assert isinstance(seconds, dict)
                size = f"{int(str(found['bytes'])) / 1e6:.1f}"
                for name, value in seconds.items():
                    rows.append([size, str(servers), name, f"{value:.3f}", f"{value / seconds['plain copy']:.1f}"])
    print(table(["MB", "servers", "transport", "seconds", "ratio to a plain copy"], rows))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
