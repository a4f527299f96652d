"""A weight push through shared memory (`weights.carrier = "ipc"`) to an embedded server on the same device.

    python benchmarks/gpu_ipc.py ipc OUT.json     # a whole push and its parts, against a plain copy of the same bytes
    ... --device cpu --tiny                       # the same code on a CPU, with a small model

The model has random weights and the shape of Qwen3-MoE with 64 experts, of which each token takes 8 (1.6B parameters).
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_parts import main, seconds_of
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import embedded_server
from megatron_rl.weights.checksum import sums64
from megatron_rl.weights.ipc import IpcTransport

SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
SIZES |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936}
SIZES |= {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make_model(folder: Path, tiny: bool) -> Path:
    """Write a random model, in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **(TINY if tiny else SIZES), max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def ipc(device: str, tiny: bool) -> dict[str, object]:
    """Return GB/s of a whole push to one server on this device, of its parts, and of a plain copy of the same bytes."""
    here = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model", tiny)
        weights = {name: tensor.to(here) for name, tensor in load_file(path / "model.safetensors").items()}
        options, environment = ["--dtype", "bfloat16"], {"MEGATRON_RL_DEVICE": device}
        server = embedded_server(str(path), Path(folder) / "log", options, environment=environment)
        size = sum(tensor.nbytes for tensor in weights.values())
        copies = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
        seconds = {
            "plain copy": seconds_of(lambda: [copies[name].copy_(tensor) for name, tensor in weights.items()], device),
            "checksums of one side": seconds_of(lambda: sums64(weights), device),
        }
        pushes = []
        with Fleet.open(
            [server], IpcTransport(1 << 20 if tiny else 1 << 28, here), Timeouts(), keep_weights=False
        ) as fleet:
            for version in range(1, 5):
                report = fleet.update(weights.items(), version)
                if report.failed:
                    raise SystemExit(f"{report.failed}")
                pushes.append(report.seconds)
        seconds["push"] = min(pushes[1:])
    rates = {f"{name} GB/s": size / value / 1e9 for name, value in seconds.items()}
    return {"bytes": size, **rates, "push of a plain copy": seconds["push"] / seconds["plain copy"]}


if __name__ == "__main__":
    main({"ipc": ipc}, __doc__)
