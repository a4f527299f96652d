"""The embedded engine: tokens a second of each way to decode, and a push of weights through shared memory.

    python benchmarks/gpu_engine.py decode OUT.json      # growing cache, slots, slots as CUDA graphs
    python benchmarks/gpu_engine.py carrier OUT.json     # `ipc` to a server on the same device, against a plain copy
    ... --device cpu --tiny                              # the same code, end to end (no graphs; memory of the CPU)

Models are random: one shaped like SmolLM2-135M (dense), one a mixture like Qwen3-MoE with 64 experts of 8 taken.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_parts import main, seconds_of
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.fleet.members import Timeouts
from megatron_rl.fleet.process import embedded_server
from megatron_rl.inference_server.engine import Engine
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import Work, parse_work
from megatron_rl.inference_server.static import StaticDecoder
from megatron_rl.ops.graphs import Graphs
from megatron_rl.weights.checksum import sums64
from megatron_rl.weights.ipc import IpcTransport

MODELS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "dense 135M": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152},
    ),
    "mixture 1.6B": (
        "qwen3_moe",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
        | {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936}
        | {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512},
    ),
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY_MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make_model(name: str, folder: Path, tiny: bool) -> Path:
    """Write a random model, in bfloat16."""
    model_type, sizes = MODELS[name]
    small = TINY | (TINY_MIXTURE if "num_experts" in sizes else {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(small if tiny else sizes), max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def work_of(rows: int, tokens: int, vocabulary: int) -> Work:
    """Return a request of rows that all take so many tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (rows, 64), generator=generator).tolist()
    params = {"max_new_tokens": tokens, "ignore_eos": True, "sampling_seed": 1}
    body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
    return parse_work(json.dumps(body).encode())


def decode(device: str, tiny: bool) -> dict[str, object]:
    """Return tokens a second by model, rows and way; the best of three requests after one that is not counted."""
    ways = ("growing", "slots") if device == "cpu" else ("growing", "slots", "graphs")
    found: dict[str, object] = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = make_model(name, Path(folder) / "model", tiny)
            for way in ways:
                for rows in (4,) if tiny else (1, 16, 64, 256):
                    found[f"{name}, {rows} rows, {way}"] = tokens_per_second(path, way, rows, device, tiny)
    return found


def tokens_per_second(path: Path, way: str, rows: int, device: str, tiny: bool) -> float:
    """Return response tokens a second of requests of equal rows."""
    model = ServedModel(str(path), "bfloat16", "0", torch.device(device, 0) if device == "cuda" else None)
    graphs = Graphs(model.device, way == "graphs")
    static = StaticDecoder(model.model, model.routes, graphs) if way != "growing" else None
    engine, tokens = Engine(model, static=static), 32 if tiny else 512
    engine.start()
    try:
        seconds = []
        for _ in range(4):
            work = work_of(rows, tokens, model.model.config.vocab_size)
            begun = time.perf_counter()
            engine.submit(work)
            work.done.result()
            seconds.append(time.perf_counter() - begun)
    finally:
        engine.close()
    if way == "graphs" and not graphs.capturing:
        raise SystemExit("no step could be captured; the log says why")
    return rows * tokens / min(seconds[1:])


def carrier(device: str, tiny: bool) -> dict[str, object]:
    """Return GB/s of a whole push to one server on this device, of its parts, and of a plain copy of the same bytes."""
    here = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = make_model("mixture 1.6B", Path(folder) / "model", tiny)
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
        with Fleet([server], IpcTransport(1 << 20 if tiny else 1 << 28, here), Timeouts(), keep_weights=False) as fleet:
            for version in range(1, 5):
                report = fleet.update(weights.items(), version)
                if report.failed:
                    raise SystemExit(f"{report.failed}")
                pushes.append(report.seconds)
        seconds["push"] = min(pushes[1:])
    rates = {f"{name} GB/s": size / value / 1e9 for name, value in seconds.items()}
    return {"bytes": size, **rates, "push of a plain copy": seconds["push"] / seconds["plain copy"]}


if __name__ == "__main__":
    main({"decode": decode, "carrier": carrier}, __doc__)
