"""Writes weights as a Hugging Face checkpoint."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.models.checkpoint_folders import copy_companions
from megatron_rl.policy.engine import Policy
from megatron_rl.util.atomic import begin_folder, commit_folder

SHARD_BYTES = 4 << 30


def export_hf(policy: Policy, run: Run, folder: Path) -> None:
    """Write the policy's weights, with config and tokenizer of ``model.path``. Collective; replaces ``folder``."""
    weights = policy.weights(run.weights.bucket_bytes)
    if not policy.mesh.world.is_main:
        for _ in weights:
            pass
    else:
        write_hf(weights, Path(run.model.path), folder)
    dist.barrier()


def write_hf(weights: Iterable[tuple[str, Tensor]], companions: Path, folder: Path) -> None:
    """Write tensors with Hugging Face names, and config and tokenizer of another folder; replaces ``folder``."""
    temporary = begin_folder(folder)
    _write_shards(weights, temporary)
    copy_companions(companions, temporary)
    commit_folder(temporary, folder)


def _write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors in the order given to files of at most ``SHARD_BYTES``, and their index."""
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = used = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > SHARD_BYTES:
            _write(shard, folder, files)
            shard, used = dict[str, Tensor](), 0
        shard[name] = tensor
        used, total = used + size, total + size
    _write(shard, folder, files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(shard: dict[str, Tensor], folder: Path, files: dict[str, str]) -> None:
    file = f"model-{len(set(files.values())) + 1:05}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    files.update(dict.fromkeys(shard, file))
