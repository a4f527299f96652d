"""Everything that the plan of a run says in numbers, from its configuration and the model's config.json."""

from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.distributed.links import gpu_memory_bytes
from megatron_rl.errors import MegatronRLError
from megatron_rl.launch.planning.flops import Step, Traffic, step_of, traffic_of
from megatron_rl.launch.planning.layout import Layout, check_layout, layout_of
from megatron_rl.launch.planning.memory import GIB, RankMemory, memory_of, work_of
from megatron_rl.launch.planning.plan import Batches, batches_of, max_prompt_tokens
from megatron_rl.launch.planning.shape import Shape, shape_of
from megatron_rl.launch.planning.suggest import Suggestion, rows_of, suggest
from megatron_rl.launch.planning.widths import Work
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class Sizes:
    """A run in numbers.

    Attributes:
        rows: micro-batches of a rank in an optimizer step, if all sequences are the longest.
        memory_bytes: of a GPU; None: none found, none given.
    """

    family: Family
    shape: Shape
    layout: Layout
    batches: Batches
    work: Work
    rows: int
    memories: tuple[RankMemory, ...]
    step: Step
    traffic: Traffic
    memory_bytes: float | None


def sizes_of(loaded: Loaded[Run], ranks: int | None = None) -> Sizes | None:
    """Return a run in numbers; None if its model or layout cannot be: ``make_plan`` says why.

    Args:
        loaded: the configuration.
        ranks: trainer ranks; None: as many as ``planned_ranks`` says.
    """
    run = loaded.run
    layout = layout_of(run.parallel, ranks or planned_ranks(loaded), run.model.megatron)
    try:
        family = family_of(read_hf_config(Path(run.model.path)))
    except MegatronRLError:
        return None
    shape, batches = shape_of(family), batches_of(run, layout)
    if check_layout(loaded, layout, shape, on_gloo=not plans_gpus(loaded)):
        return None
    work, rows = work_of(run, layout, batches.longest, fused=plans_gpus(loaded)), rows_of(batches, layout)
    return Sizes(
        family=family,
        shape=shape,
        layout=layout,
        batches=batches,
        work=work,
        rows=rows,
        memories=memory_of(run, family, layout, work, rows),
        step=step_of(run, family, longest=batches.longest, prompt=max_prompt_tokens(run)),
        traffic=traffic_of(run, family, layout, work, rows),
        memory_bytes=memory_bytes(run),
    )


def planned_ranks(loaded: Loaded[Run]) -> int | None:
    """Return the trainer ranks that a config asks for: its own, or those of its Slurm job if it describes one."""
    run = loaded.run
    if run.parallel.ranks is None and loaded.origin("slurm.nodes") != "default":
        return run.slurm.nodes * run.slurm.ranks
    return run.parallel.ranks


def plans_gpus(loaded: Loaded[Run]) -> bool:
    """Return whether the plan is one for GPUs: some are here, or described by ``[cluster]``, or asked of Slurm."""
    asked = loaded.origin("slurm.nodes") != "default" and loaded.run.slurm.gpus_per_node > 0
    return asked or memory_bytes(loaded.run) is not None


def memory_bytes(run: Run) -> float | None:
    """Return the memory of a GPU: as given, or as found here."""
    given = run.cluster.gpu_memory_gib
    return given * GIB if given is not None else gpu_memory_bytes()


def suggestions_for(loaded: Loaded[Run], sizes: Sizes) -> list[Suggestion]:
    """Return layouts of as many ranks that fit, the fastest first; nothing where no GPU's memory is known."""
    if sizes.memory_bytes is None:
        return []
    return suggest(loaded, sizes.family, sizes.shape, sizes.layout.ranks, sizes.memory_bytes)
