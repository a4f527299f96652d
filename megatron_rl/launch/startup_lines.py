"""What ``megatron-rl train`` says before it starts anything: ranks, model, task, servers, versions."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_rl.config.schema import Run
from megatron_rl.config.secret_settings import mask_urls
from megatron_rl.distributed.mesh import on_cuda
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.observability.file_names import CONSOLE

AXES = ("data", "tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
VERSIONS = ("megatron-rl", "torch", "megatron-core", "python")


def startup_lines(run: Run, layout: ParallelLayout, versions: Mapping[str, str | None]) -> Iterator[str]:
    """Yield five lines about a run."""
    sizes = [f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1]
    ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks"
    device = versions.get("gpus") if on_cuda() else "CPU"
    yield f"{ranks} on {device}: {', '.join(sizes) or 'no parallelism'}; {run.model.dtype}"
    yield f"model {run.model.path}"
    train = run.train
    yield (
        f"{run.task.name}, {run.objective.label}: {train.steps} steps of {train.prompts_per_step} prompts with"
        f" {train.group_size} responses, {train.updates_per_step} updates per step"
    )
    yield f"servers: {_servers(run)}"
    found = ", ".join(f"{name} {versions[name]}" for name in VERSIONS if versions.get(name))
    yield f"{found}; log: {Path(run.log.path) / CONSOLE}"


def _servers(run: Run) -> str:
    rollout = run.rollout
    if rollout.urls:
        return mask_urls(f"{rollout.engine} at {', '.join(rollout.urls)}")
    if rollout.registry:
        return f"{rollout.servers} of {rollout.engine}, listed in {rollout.registry}"
    return f"{rollout.servers} of {rollout.engine}, started here"
