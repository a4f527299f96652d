"""The first minutes on a GPU: versions, layers, one training step on each path, and log-probs against a shipped file.

    python benchmarks/gpu_smoke.py import OUT.json       # versions and devices
    python benchmarks/gpu_smoke.py spec OUT.json         # classes of the layers on both paths
    python benchmarks/gpu_smoke.py step OUT.json         # scoring, backward pass and optimizer step on both paths
    python benchmarks/gpu_smoke.py parity OUT.json       # log-probs of four families against gpu_smoke_reference.json
    python benchmarks/gpu_smoke.py reference             # computes that file: transformers in float64, on a CPU
    ... --device cpu                                     # the same code on a CPU
    ... --device cpu --doubles                           # with transformer-engine, its kernels replaced (tests/te)

Models are random with a fixed seed; the file has a checksum of their weights, as other versions may make other models.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.distributed.mesh import World, single_rank_world
from megatron_rl.launch.versions import found_versions
from megatron_rl.policy.backends import PLAIN_VARIABLE, backends_for
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.process_groups import destroy_mesh
from tests.policy import families
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of

REFERENCE = Path(__file__).with_name("gpu_smoke_reference.json")
FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss")
LARGEST_ERROR = 0.1
"""Nats per token, for nine of ten tokens: bfloat16 against float64 over four layers."""


def checksum(model: torch.nn.Module) -> float:
    """Return the sum of the absolute values of all weights."""
    return float(sum(parameter.double().abs().sum() for parameter in model.parameters()))


def write_reference() -> None:
    """Compute the log-probs of the families' bfloat16 weights with transformers in float64."""
    from tests.policy.test_families import by_transformers

    entries: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FAMILIES:
            path = families.save(name, Path(folder, name), torch.bfloat16)
            logprobs_T = by_transformers(path, case())["logprobs_T"]
            weights = checksum(families.make(name, torch.bfloat16))
            entries[name] = {"checksum": weights, "logprobs": [round(value, 6) for value in logprobs_T.tolist()]}
    REFERENCE.write_text(json.dumps(entries) + "\n", encoding="utf-8")


def policy_of(name: str, folder: Path, world: World) -> Policy:
    """Return the policy of a random model in bfloat16."""
    path = families.save(name, folder / name, torch.bfloat16)
    run = run_of(path, model={"dtype": "bfloat16"}, train={"tokens_per_microbatch": 2048})
    return Policy(run, world, total_updates=1)


def spec(world: World, folder: Path) -> Mapping[str, object]:
    """Return the classes of attention and expert layers."""
    modules = [module for chunk in policy_of("qwen3_moe", folder, world).chunks for module in chunk.modules()]
    kinds = sorted({type(module).__name__ for module in modules if "Attention" in type(module).__name__})
    experts = sorted({type(module).__name__ for module in modules if "Experts" in type(module).__name__
                      or "GroupedMLP" in type(module).__name__})  # fmt: skip
    return {"attention": kinds, "experts": experts}


def step(world: World, folder: Path) -> Mapping[str, object]:
    """Return the seconds and the gradient norm of one training step."""
    policy = policy_of("qwen3_moe", folder, world)
    batch = policy.local_part(case())
    started = time.perf_counter()
    policy.compute_logprobs(batch)
    policy.forward_backward(batch, weighted)
    norm = policy.optim_step().grad_norm
    return {"seconds": round(time.perf_counter() - started, 3), "grad_norm": norm}


def parity(world: World, folder: Path) -> Mapping[str, object]:
    """Return each family's log-prob error that nine of ten tokens do not exceed."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    errors: dict[str, object] = {}
    for name in FAMILIES:
        expected = reference[name]
        if abs(checksum(families.make(name, torch.bfloat16)) / expected["checksum"] - 1) > 1e-6:
            raise SystemExit(f"{name}: this torch or transformers makes another random model; write a new reference")
        policy = policy_of(name, folder, world)
        logprobs_T: Tensor = policy.compute_logprobs(policy.local_part(case())).logprobs_T
        errors_T = (logprobs_T.double().cpu() - torch.tensor(expected["logprobs"], dtype=torch.float64)).abs()
        errors[name] = float(errors_T.quantile(0.9))  # nearly equal scores route some tokens elsewhere in bfloat16
        destroy_mesh()
    return errors


PARTS = {"spec": spec, "step": step, "parity": parity}


def measured(part: str, device: str, doubles: bool) -> dict[str, object]:
    """Return the part's figures on transformer-engine's layers, if they can be used, and on the local ones."""
    if doubles:
        return rehearsed(part)
    figures: dict[str, object] = {}
    for path, plain in (("engine", ""), ("local", "engine")):
        os.environ[PLAIN_VARIABLE] = plain
        if path == "engine" and not backends_for(torch.bfloat16, device).engine:
            figures[path] = "not available"
        else:
            figures[path] = figures_of(part)
    return figures


def rehearsed(part: str) -> dict[str, object]:
    """Return the part's figures on both paths, on a CPU with the stand-ins of tests/te."""
    from tests.te import doubles

    doubles.install()
    figures: dict[str, object] = {}
    for path in ("engine", "local"):
        doubles.select(replace(doubles.ENGINE, engine=path == "engine", grouped=path == "local"))
        figures[path] = figures_of(part)
    return figures


def figures_of(part: str) -> Mapping[str, object]:
    """Return the part's figures on one path."""
    with tempfile.TemporaryDirectory() as folder:
        figures = PARTS[part](single_rank_world(), Path(folder))
    destroy_mesh()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("import", *PARTS, "reference"))
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--doubles", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="accepted as by the other scripts; nothing is smaller")
    arguments = parser.parse_args()
    os.environ["MEGATRON_RL_DEVICE"] = arguments.device
    if arguments.part == "reference":
        write_reference()
        return
    if arguments.part == "import":
        figures: dict[str, object] = {"versions": found_versions()}
    else:
        figures = measured(arguments.part, arguments.device, arguments.doubles)
    print(json.dumps(figures, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    if arguments.part == "parity":
        wrong = [f"{path} {name} {error:.2g}" for path, errors in figures.items() if isinstance(errors, dict)
                 for name, error in errors.items() if not error < LARGEST_ERROR]  # fmt: skip
        if wrong:
            raise SystemExit(f"log-prob errors above {LARGEST_ERROR}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
