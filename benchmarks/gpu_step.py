"""Scoring and training steps of a random Qwen3-MoE on one device: tokens/s, share of the matrix limit, memory, profile.

    python benchmarks/gpu_step.py OUT.json --size 1.5B --tokens 8192 --limit LIMIT.json
    python benchmarks/gpu_step.py OUT.json --device cpu --tiny           # the same code, end to end, in a minute

Weights are random and made on the device; no checkpoint is written. A step is forward and backward over ``--rows``
packed rows and an optimizer step if its state fits (``--no-step`` leaves it out: 18 bytes per parameter are 180 GB at
10B). FLOPs count the matrices that a token passes through, times 2 for the forward pass and 6 for a step, and causal
attention; what is computed twice (recomputation, logits in the backward pass) counts once. Times are medians of
``--repeats``.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import median_seconds, synchronize
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import layout_of
from megatron_rl.launch.planning.memory import stage_memory
from megatron_rl.launch.planning.microbatch import full_microbatch
from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class Size:
    """The sizes of a Qwen3-MoE."""

    hidden: int
    layers: int
    experts: int
    width: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int = 151_936
    chosen: int = 8

    @property
    def config(self) -> dict[str, object]:
        """The config.json of a Hugging Face checkpoint."""
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "max_position_embeddings": 40_960,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        }

    @property
    def active(self) -> int:
        """Elements of the matrices that a token passes through, with the output layer and without the embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        experts = self.chosen * 3 * self.hidden * self.width + self.hidden * self.experts
        return self.layers * (attention + experts) + self.hidden * self.vocabulary

    def flops(self, tokens: int, length: int) -> float:
        """Return the FLOPs of a forward pass over sequences of ``length``; a training step has three times as many."""
        scores = 2 * 2 * self.heads * self.head_dim * length / 2
        return tokens * (2 * self.active + self.layers * scores)


SIZES = {
    "1.5B": Size(1024, 16, 64, 384, 16, 4, 128),
    "10B": Size(2048, 16, 128, 768, 32, 4, 128),
    "tiny": Size(64, 2, 8, 32, 4, 2, 16, vocabulary=512, chosen=2),
}


def fill(chunks: list[nn.Module], *_: object) -> None:
    """Fill matrices from a normal distribution and vectors with 1, instead of loading a checkpoint."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.copy_(0.02 * torch.randn_like(parameter) if parameter.dim() > 1 else torch.ones_like(parameter))


def main(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure and return the results."""
    os.environ["MEGATRON_RL_DEVICE"] = arguments.device
    from megatron_rl.algorithms.loss import make_loss, prepare
    from megatron_rl.algorithms.objectives import GRPO
    from megatron_rl.data.types import Batch
    from megatron_rl.distributed.mesh import DETERMINISTIC_ENVIRONMENT, make_deterministic, single_rank_world
    from megatron_rl.policy import engine

    if arguments.deterministic:
        os.environ.update(DETERMINISTIC_ENVIRONMENT)
    size = SIZES["tiny" if arguments.tiny else arguments.size]
    world = single_rank_world()
    make_deterministic(arguments.deterministic, world.device)
    setattr(engine, "load_weights", fill)  # noqa: B010 (a benchmark needs no checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(size.config))
        run = Run.model_validate(
            {
                "model": {"path": folder, "dtype": arguments.dtype, "recompute": arguments.recompute},
                "train": {"tokens_per_microbatch": arguments.tokens, "deterministic": arguments.deterministic},
            }
        )
        policy = engine.Policy(run, world, total_updates=10)
    built = memory()
    total = arguments.rows * arguments.tokens
    lengths_B = torch.full((total // arguments.length,), arguments.length)
    place_T = torch.arange(total) % arguments.length
    batch = Batch(
        lengths_B,
        {
            "input_ids_T": torch.randint(0, size.vocabulary, (total,)),
            "loss_mask_T": place_T >= arguments.length // 8,
            "advantages_B": torch.randn(len(lengths_B)).double(),
        },
    )
    objective = GRPO()
    part = policy.local_part(batch)
    scored = part.add(policy.compute_logprobs(part).as_old())
    prepared = scored.add(prepare(scored, objective, total=policy.total))

    def step() -> None:
        policy.forward_backward(prepared, make_loss(objective))
        if not arguments.no_step:
            policy.optim_step()

    results: dict[str, object] = {"parameters": sum(p.numel() for c in policy.chunks for p in c.parameters())}
    limit = json.loads(arguments.limit.read_text())["bf16 TFLOP/s"] if arguments.limit else None
    work = {"score": (lambda: policy.compute_logprobs(part), 1), "step": (step, 3)}
    for name, (operation, passes) in work.items():
        seconds = median_seconds(operation, world.device.type, arguments.repeats)
        tera = passes * size.flops(total, arguments.length) / seconds / 1e12
        shares = {"share of limit": tera / limit} if limit else {}
        measured = {"seconds": seconds, "tokens/s": total / seconds, "TFLOP/s": tera, "peak": memory(peak=True)}
        results[name] = {**measured, **shares}
    results |= {"built": built, "active": size.active, "size": asdict(size)}
    results["planned"] = planned(run, policy.family, arguments)
    if arguments.profile:
        results["profile"] = profiled(step, world.device)
    return results


def planned(run: Run, family: Family, arguments: argparse.Namespace) -> dict[str, int]:
    """Return the bytes that the plan of ``megatron-rl check`` predicts for this device, without its reserve."""
    layout = layout_of(run.parallel, 1, run.model.megatron)
    work = full_microbatch(run, arguments.length, fused=arguments.device == "cuda")
    (rank,) = stage_memory(run, family, layout, work, arguments.rows)
    standing = {"parameters": rank.parameters, "gradients": rank.gradients, "optimizer": rank.optimizer}
    return {**standing, "activations": rank.activations.total, "total": rank.total - rank.reserved}


def memory(*, peak: bool = False) -> int | None:
    """Return the bytes of tensors on the device, now or the peak since the last call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return used


def profiled(operation: Callable[[], object], device: torch.device) -> list[dict[str, object]]:
    """Return the 20 operations that take most of the device's time, slowest first."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as watched:
        operation()
        synchronize(device.type)
    field = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = sorted(watched.key_averages(), key=lambda event: -getattr(event, field))
    whole = sum(getattr(event, field) for event in events) or 1
    return [
        {"name": event.key[:80], "share": getattr(event, field) / whole, "calls": event.count} for event in events[:20]
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and rows that a CPU computes in seconds")
    parser.add_argument("--size", choices=tuple(SIZES), default="1.5B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per packed row")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--no-step", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--limit", type=Path, help="the file of `gpu_parts.py limit`")
    given = parser.parse_args()
    if given.tiny:
        given.tokens, given.length, given.repeats = 256, 64, 1
    found = main(given)
    settings = {name: str(value) for name, value in vars(given).items()}
    plain = os.environ.get("MEGATRON_RL_PLAIN", "")
    given.output.write_text(json.dumps({"settings": {**settings, "plain": plain}, **found}, indent=1))
    print(json.dumps({name: found[name] for name in ("score", "step")}))
