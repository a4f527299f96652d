#!/usr/bin/env python
"""Make a mixture of experts out of a dense model: python tools/upcycle.py DENSE TARGET --experts 4

Every expert is a copy of the dense feed-forward network and the chosen ones' weights add up to 1, so that without noise
the new model computes what the dense one does: Llama becomes Mixtral, Qwen3 becomes Qwen3-MoE, and Qwen2 becomes
Qwen2-MoE, whose shared expert is zeros. Routers are random. The outputs of both on a few tokens are compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.errors import ConfigError, DataError, MegatronRLError
from megatron_rl.models.checkpoint_folders import copy_companions, open_checkpoint
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_reader import INDEX

BECOMES = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DENSE_PART = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"} | {
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
ROUTER_SPREAD = 0.02
SHARED_WIDTH = 16
LARGEST_DIFFERENCE = 1e-3
"""Of logits in float32, without noise; a few rounding errors of each layer."""


def main() -> int:
    """Write the mixture, compare, and return 1 if it should be equal and is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--topk", type=int, default=2, help="experts a token")
    parser.add_argument("--noise", type=float, default=0.0, help="relative, on every weight of every expert")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        upcycle(args.dense, args.target, (args.experts, args.topk), args.noise, args.seed)
    except MegatronRLError as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    largest, agree, count = compare(args.dense, args.target)
    print(f"{args.target}: {args.experts} experts, {args.topk} a token, noise {args.noise}")
    print(f"logits differ by at most {largest:.3g} from the dense model's; the likeliest token is the same")
    print(f"for {agree} of {count} tokens (float32, random tokens)")
    return int(args.noise == 0 and (largest > LARGEST_DIFFERENCE or agree < count))


def mixture_config(hf: dict[str, object], experts: int, topk: int) -> dict[str, object]:
    """Return config.json of the mixture.

    Raises:
        ConfigError: a model that is none of the three dense families.
    """
    kind = str(hf.get("model_type"))
    if kind not in BECOMES:
        raise ConfigError(f"model_type {kind!r} cannot be upcycled; {', '.join(BECOMES)} can")
    new = {**hf, "model_type": BECOMES[kind], "architectures": [ARCHITECTURES[BECOMES[kind]]]}
    # SGLang's mixtures have a head of their own, whatever is said of tying: it would stay what memory held.
    new |= {"num_experts_per_tok": topk, "output_router_logits": False, "tie_word_embeddings": False}
    if kind == "llama":
        return new | {"num_local_experts": experts, "sliding_window": None}
    shared = {"shared_expert_intermediate_size": SHARED_WIDTH} if kind == "qwen2" else {}
    width = {"num_experts": experts, "moe_intermediate_size": hf["intermediate_size"], "norm_topk_prob": True}
    return new | width | shared | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def upcycle(dense: Path, target: Path, sizes: tuple[int, int], noise: float, seed: int) -> None:
    """Write the mixture, a layer at a time.

    Raises:
        ConfigError: a family that cannot be upcycled, or a target that is there.
        DataError: a damaged checkpoint.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; remove it, or give another folder")
    hf = dict(read_hf_config(dense))
    family = family_of(hf)
    source = open_checkpoint(dense, family)
    source.check(family)
    config = mixture_config(hf, *sizes)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in family_of(config).hf_shapes().items():
        layer = match[1] if (match := re.match(r"model\.layers\.(\d+)\.", name)) else "ends"
        layers.setdefault(layer, {})[name] = shape
    beside = target.with_name(f".{target.name}.part")
    beside.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(layers.values(), 1):
        file = f"model-{number:05}-of-{len(layers):05}.safetensors"
        tensors = dict(_filled(names, source, noise, generator))
        save_file(tensors, beside / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    copy_companions(dense, beside)
    (beside / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    beside.rename(target)


def _filled(
    names: dict[str, tuple[int, ...]], source: CheckpointReader, noise: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the mixture: the dense model's own, an expert's copy of it, a router, or zeros."""
    for name, shape in names.items():
        if name in source.specs:
            yield name, source.read(name)
        elif name == "lm_head.weight":
            yield name, source.read("model.embed_tokens.weight")
        elif match := re.fullmatch(r"(model\.layers\.\d+\.)\w+\.experts\.\d+\.(\w+)\.weight", name):
            weight = source.read(f"{match[1]}mlp.{DENSE_PART[match[2]]}.weight")
            factor = 1 + noise * torch.randn(shape, generator=generator) if noise else 1
            yield name, (weight.float() * factor).to(weight.dtype) if noise else weight
        else:
            dtype = source.specs["model.embed_tokens.weight"].dtype
            is_router = name.endswith(".gate.weight")
            values = ROUTER_SPREAD * torch.randn(shape, generator=generator) if is_router else torch.zeros(shape)
            yield name, values.to(dtype)


@torch.no_grad()
def compare(dense: Path, mixture: Path) -> tuple[float, int, int]:
    """Return the largest difference of logits, and for how many of how many tokens the likeliest next one agrees."""
    logits = []
    for folder in (dense, mixture):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, 48), generator=torch.Generator().manual_seed(1))
        logits.append(model(ids).logits[0])
        del model
    first, second = logits
    if not bool(second.isfinite().all()):
        raise DataError(f"{mixture} gives logits that are not finite")
    agree = int((first.argmax(-1) == second.argmax(-1)).sum())
    return float((first - second).abs().max()), agree, len(first)


if __name__ == "__main__":
    sys.exit(main())
