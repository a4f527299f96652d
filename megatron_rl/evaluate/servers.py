"""The fleet of an evaluation: new servers with the weights, or running servers that receive the weights first."""

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
from megatron_rl.models.served_weights import ServedWeights
from megatron_rl.rollout.fleet_setup import FleetTokenizer, make_transport, open_fleet, weights_folder
from megatron_rl.train.export import write_hf

VERSION = 0
"""Version of the weights at every server."""


@contextmanager
def serving(run: Run, tokenizer: FleetTokenizer, scratch: Path) -> Iterator[Fleet]:
    """Yield a fleet whose servers have the weights of ``model.path``, a checkpoint of any format.

    Args:
        run: the configuration. Servers that it names keep running afterward, with the weights.
        tokenizer: tokenizer of the model.
        scratch: folder for logs and temporary copies of the weights.
    """
    log = run.log.model_copy(update={"path": str(scratch)})
    starts_servers = not run.rollout.urls and not run.rollout.registry
    # Without lag, embedded servers are deterministic. Servers that are started load the weights from their folder.
    folder = None if starts_servers else run.rollout.model_path
    rollout = run.rollout.model_copy(update={"max_lag": 0, "model_path": folder})
    run = run.model_copy(update={"log": log, "rollout": rollout})
    copied = scratch / "model"
    if starts_servers and run.rollout.engine != "embedded" and not holds_hf_files(Path(run.model.path)):
        write_hf(weights_of(run), Path(run.model.path), copied)
        run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(copied)})})
    try:
        transport = make_transport(run, World(0, 1, torch.device("cpu")))
        with open_fleet(run, tokenizer, transport, pushes=not starts_servers) as fleet:
            if not starts_servers:
                fleet.update(ServedWeights.of(run).encoded(weights_of(run)), VERSION)
            yield fleet
    finally:
        for folder in (copied, weights_folder(run)):
            shutil.rmtree(folder, ignore_errors=True)


def weights_of(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face names and tensors of ``model.path``, in ``model.dtype``."""
    folder = Path(run.model.path)
    family = family_of(read_hf_config(folder))
    source = open_checkpoint(folder, family)
    for name in family.hf_shapes():
        yield name, source.read(name).to(getattr(torch, run.model.dtype))
