"""Memory, FLOPs and communication of a run, from its configuration and the model's ``config.json``."""

from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.distributed.links import gpu_memory_bytes
from megatron_rl.errors import MegatronRLError
from megatron_rl.launch.planning.host_memory import HostColumns, host_columns
from megatron_rl.launch.planning.layout import ParallelLayout, check_layout, layout_of
from megatron_rl.launch.planning.memory import GIB, RankMemory, stage_memory
from megatron_rl.launch.planning.microbatch import MicrobatchWork, full_microbatch
from megatron_rl.launch.planning.model_sizes import ModelSizes, model_sizes
from megatron_rl.launch.planning.run_plan import BatchSizes, batch_sizes, max_prompt_tokens
from megatron_rl.launch.planning.step_cost import RankTraffic, StepCost, rank_traffic, step_cost
from megatron_rl.launch.planning.suggest import LayoutSuggestion, microbatches_per_rank, suggest
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class RunEstimate:
    """The numbers that ``megatron-rl check`` prints for a run.

    Attributes:
        microbatches: micro-batches per rank and optimizer step if every sequence has the maximum length.
        memories: memory per rank of each pipeline stage.
        columns: host memory of a step's token columns.
        memory_bytes: memory of one GPU; None if no GPU is configured or found.
    """

    family: Family
    sizes: ModelSizes
    layout: ParallelLayout
    batches: BatchSizes
    work: MicrobatchWork
    microbatches: int
    memories: tuple[RankMemory, ...]
    cost: StepCost
    traffic: RankTraffic
    columns: HostColumns
    memory_bytes: float | None


def estimate_run(loaded: Loaded[Run], ranks: int | None = None) -> RunEstimate | None:
    """Return the estimate of a run; None if its model or layout is invalid, for the reasons that ``make_plan`` gives.

    Args:
        loaded: the configuration.
        ranks: number of trainer ranks; None: ``planned_ranks``.
    """
    run = loaded.run
    layout = layout_of(run.parallel, ranks or planned_ranks(loaded), run.model.megatron)
    try:
        family = family_of(read_hf_config(Path(run.model.path)))
    except MegatronRLError:
        return None
    on_gpus, sizes, batches = plans_gpus(loaded), model_sizes(family), batch_sizes(run, layout)
    if check_layout(loaded, layout, sizes, on_gloo=not on_gpus):
        return None
    work = full_microbatch(run, batches.longest, fused=on_gpus)
    microbatches = microbatches_per_rank(batches, layout)
    cost = step_cost(run, family, longest=batches.longest, prompt=max_prompt_tokens(run))
    return RunEstimate(
        family=family,
        sizes=sizes,
        layout=layout,
        batches=batches,
        work=work,
        microbatches=microbatches,
        memories=stage_memory(run, family, layout, work, microbatches),
        cost=cost,
        traffic=rank_traffic(run, family, layout, work, microbatches),
        columns=host_columns(run, family, layout, cost.tokens),
        memory_bytes=gpu_memory(run),
    )


def planned_ranks(loaded: Loaded[Run]) -> int | None:
    """Return ``parallel.ranks``, or the ranks of the Slurm job if ``slurm.nodes`` is set, or None."""
    run = loaded.run
    if run.parallel.ranks is None and loaded.origin("slurm.nodes") != "default":
        return run.slurm.nodes * run.slurm.ranks
    return run.parallel.ranks


def plans_gpus(loaded: Loaded[Run]) -> bool:
    """Return whether the trainer will have GPUs: requested from Slurm, described in ``[cluster]``, or found here."""
    requested = loaded.origin("slurm.nodes") != "default" and loaded.run.slurm.gpus_per_node > 0
    return requested or gpu_memory(loaded.run) is not None


def gpu_memory(run: Run) -> float | None:
    """Return the bytes of one GPU's memory: ``cluster.gpu_memory_gib``, or of a GPU of this machine, or None."""
    gib = run.cluster.gpu_memory_gib
    return gib * GIB if gib is not None else gpu_memory_bytes()


def suggestions_for(loaded: Loaded[Run], estimate: RunEstimate) -> list[LayoutSuggestion]:
    """Return layouts of the same number of ranks that fit, fastest first; empty if the GPU memory is unknown."""
    if estimate.memory_bytes is None:
        return []
    return suggest(loaded, estimate.family, estimate.sizes, estimate.layout.ranks, estimate.memory_bytes)
