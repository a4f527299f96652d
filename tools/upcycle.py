#!/usr/bin/env python
"""Turn a dense model into a mixture of experts: python tools/upcycle.py DENSE TARGET --experts 4

Each expert is a copy of the dense feed-forward network, and the weights of the selected experts sum to 1, so without
noise the mixture computes the same function. Llama becomes Mixtral, Qwen3 becomes Qwen3-MoE, and Qwen2 becomes
Qwen2-MoE with a shared expert of zeros. Routers are random. The outputs of both models are compared on a few tokens.
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
from megatron_rl.util.atomic import begin_folder, commit_folder

MIXTURE_TYPES = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DENSE_NAMES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"} | {
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
ROUTER_STD = 0.02
SHARED_EXPERT_WIDTH = 16
MAX_LOGIT_DIFFERENCE = 1e-3
"""Tolerance for float32 logits without noise: a few rounding errors per layer."""


def main() -> int:
    """Write the mixture and compare it; return 1 if the outputs differ although there is no noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--topk", type=int, default=2, help="experts per token")
    parser.add_argument("--noise", type=float, default=0.0, help="relative noise on the weights of the experts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        upcycle(args.dense, args.target, (args.experts, args.topk), args.noise, args.seed)
    except MegatronRLError as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    largest, agree, count = compare(args.dense, args.target)
    print(f"{args.target}: {args.experts} experts, {args.topk} per token, noise {args.noise}")
    print(f"logits differ by at most {largest:.3g} from those of the dense model; the most likely token is the same")
    print(f"for {agree} of {count} tokens (float32, random tokens)")
    return int(args.noise == 0 and (largest > MAX_LOGIT_DIFFERENCE or agree < count))


def mixture_config(hf: dict[str, object], experts: int, topk: int) -> dict[str, object]:
    """Return config.json of the mixture.

    Raises:
        ConfigError: the model is not of a supported dense family.
    """
    kind = str(hf.get("model_type"))
    if kind not in MIXTURE_TYPES:
        raise ConfigError(f"model_type {kind!r} cannot be upcycled; {', '.join(MIXTURE_TYPES)} can")
    new = {**hf, "model_type": MIXTURE_TYPES[kind], "architectures": [ARCHITECTURES[MIXTURE_TYPES[kind]]]}
    # SGLang's mixtures ignore tie_word_embeddings and would leave the output head uninitialized.
    new |= {"num_experts_per_tok": topk, "output_router_logits": False, "tie_word_embeddings": False}
    if kind == "llama":
        return new | {"num_local_experts": experts, "sliding_window": None}
    shared = {"shared_expert_intermediate_size": SHARED_EXPERT_WIDTH} if kind == "qwen2" else {}
    width = {"num_experts": experts, "moe_intermediate_size": hf["intermediate_size"], "norm_topk_prob": True}
    return new | width | shared | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def upcycle(dense: Path, target: Path, sizes: tuple[int, int], noise: float, seed: int) -> None:
    """Write the mixture, one layer at a time.

    Raises:
        ConfigError: the model family cannot be upcycled, or the target exists.
        DataError: the checkpoint is damaged.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; remove it, or give another folder")
    hf = dict(read_hf_config(dense))
    family = family_of(hf)
    source = open_checkpoint(dense, family)
    source.check(family)
    config = mixture_config(hf, *sizes)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in family_of(config).hf_shapes().items():
        layer = match[1] if (match := re.match(r"model\.layers\.(\d+)\.", name)) else "ends"
        layers.setdefault(layer, {})[name] = shape
    staging = begin_folder(target)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(layers.values(), 1):
        file = f"model-{number:05}-of-{len(layers):05}.safetensors"
        tensors = dict(_mixture_tensors(names, source, noise, generator))
        save_file(tensors, staging / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    copy_companions(dense, staging)
    (staging / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    commit_folder(staging, target)


def _mixture_tensors(
    names: dict[str, tuple[int, ...]], source: CheckpointReader, noise: float, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the mixture: from the dense model, copied for an expert, a random router, or zeros."""
    for name, shape in names.items():
        if name in source.specs:
            yield name, source.read(name)
        elif name == "lm_head.weight":
            yield name, source.read("model.embed_tokens.weight")
        elif match := re.fullmatch(r"(model\.layers\.\d+\.)\w+\.experts\.\d+\.(\w+)\.weight", name):
            weight = source.read(f"{match[1]}mlp.{DENSE_NAMES[match[2]]}.weight")
            factor = 1 + noise * torch.randn(shape, generator=generator) if noise else 1
            yield name, (weight.float() * factor).to(weight.dtype) if noise else weight
        else:
            dtype = source.specs["model.embed_tokens.weight"].dtype
            is_router = name.endswith(".gate.weight")
            values = ROUTER_STD * torch.randn(shape, generator=generator) if is_router else torch.zeros(shape)
            yield name, values.to(dtype)


@torch.no_grad()
def compare(dense: Path, mixture: Path) -> tuple[float, int, int]:
    """Return the largest difference of logits, the number of tokens with equal argmax, and the number of tokens."""
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
