"""Training checkpoints: every rank's exact state, written beside and renamed, so that the newest is always whole.

    RUN/checkpoints/step_00000020/meta.json          step, layout, checksums; its presence makes the checkpoint valid
                                  rank_00000.safetensors   this rank's weights, main weights and Adam moments

A checkpoint resumes on the layout that wrote it, bit for bit.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.parallel.collectives import gather_json
from megatron_rl.parallel.mesh import World
from megatron_rl.policy.engine import Policy
from megatron_rl.train.folder import replace_text
from megatron_rl.train.resume import (
    META,
    check_resumable,
    checkpoint_folder,
    layout_record,
    newest_checkpoint,
    valid_checkpoints,
)


class Checkpoints:
    """Writes, keeps and reads the checkpoints of one run folder. Every method but ``is_due`` is collective."""

    def __init__(self, run: Run, world: World, policy: Policy) -> None:
        self.folder = checkpoint_folder(run)
        self.run, self.world, self.policy = run, world, policy
        self.layout = layout_record(run, world.size)

    def is_due(self, step: int) -> bool:
        """Return whether ``checkpoint.every`` asks for one after this many steps."""
        return self.run.checkpoint.every > 0 and step % self.run.checkpoint.every == 0

    def save(self, step: int) -> None:
        """Write the state after ``step`` rollout batches; drop checkpoints beyond ``checkpoint.keep``."""
        final, beside = self.folder / _name(step), self.folder / f".{_name(step)}.part"
        if self.world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        file = beside / _rank_file(self.world.rank)
        save_file(_unshared(self.policy.state_tensors()), file)
        digests = cast(list[tuple[str, str]], gather_json([file.name, _digest(file)], self.world.device))
        if self.world.is_main:
            meta = {
                "step": step,
                "updates": self.policy.updates,
                "layout": self.layout,
                "sha256": dict(digests),
            }
            replace_text(beside / META, json.dumps(meta, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            for old in valid_checkpoints(self.folder)[: -self.run.checkpoint.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self) -> int:
        """Restore the newest checkpoint; return how many rollout batches it has seen, 0 without a checkpoint.

        Raises:
            ConfigError: it was written by another layout.
            DataError: a file is missing or was changed.
        """
        check_resumable(self.run, self.world.size)
        newest = newest_checkpoint(self.run)
        if newest is None:
            return 0
        meta = json.loads((newest / META).read_text())
        file = newest / _rank_file(self.world.rank)
        if not file.is_file() or _digest(file) != meta["sha256"].get(file.name):
            raise DataError(f"{file} is missing or not the file that was written; delete {newest} to use an older one")
        try:
            self.policy.load_state_tensors(load_file(file), meta["updates"])
        except SafetensorError as error:
            raise DataError(f"{file} cannot be read: {error}; delete {newest} to use an older one") from error
        return meta["step"]


def _name(step: int) -> str:
    return f"step_{step:08}"


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05}.safetensors"


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
