"""The fleet that answers: servers of our own on the weights, or running ones that are given them first."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import World
from megatron_rl.fleet.fleet import Fleet
from megatron_rl.models.checkpoint_folders import holds_hf_files, open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.rollout.fleet_setup import Chat, open_fleet, weights_folder
from megatron_rl.train.export import write_hf

VERSION = 0
"""Of the weights, at every server."""


@contextmanager
def serving(run: Run, tokenizer: Chat, scratch: Path) -> Iterator[Fleet]:
    """Give a fleet whose servers have the weights of ``model.path``, whatever kind of checkpoint that is.

    Servers that ran already keep the weights. ``scratch`` takes logs, and copies of the weights while they are needed.
    """
    log = run.log.model_copy(update={"path": str(scratch)})
    rollout = run.rollout.model_copy(update={"max_lag": 0})  # servers of ours repeat bit for bit without one
    run = run.model_copy(update={"log": log, "rollout": rollout})
    ours = not run.rollout.urls and not run.rollout.registry
    copied = scratch / "model"
    if ours and run.rollout.engine != "embedded" and not holds_hf_files(Path(run.model.path)):
        write_hf(weights_of(run), Path(run.model.path), copied)
        run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(copied)})})
    try:
        with open_fleet(run, World(0, 1, torch.device("cpu")), tokenizer) as fleet:
            if not ours:
                fleet.update(weights_of(run), VERSION)
            yield fleet
    finally:
        for folder in (copied, weights_folder(run)):
            shutil.rmtree(folder, ignore_errors=True)


def weights_of(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of ``model.path`` under Hugging Face names, in ``model.dtype``, one at a time."""
    folder = Path(run.model.path)
    family = family_of(read_hf_config(folder))
    source = open_checkpoint(folder, family)
    for name in family.hf_shapes():
        yield name, source.read(name).to(getattr(torch, run.model.dtype))
