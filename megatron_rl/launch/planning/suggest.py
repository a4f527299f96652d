"""Suggested layouts: those of the same number of ranks that fit into memory, fastest first by a rough estimate."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import FIRST, LAST, ParallelLayout, check_layout, layout_of
from megatron_rl.launch.planning.memory import fullest, stage_memory
from megatron_rl.launch.planning.microbatch import full_microbatch
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.launch.planning.run_plan import BatchSizes, batch_sizes
from megatron_rl.launch.planning.step_cost import (
    RankTraffic,
    expert_efficiency,
    expert_fraction,
    pipeline_bubble,
    rank_traffic,
    step_cost,
)
from megatron_rl.models.hf_mapping.rules import Family

RECOMPUTES = ("none", "selective", "full")

MEMORY_FRACTION = 0.95
"""Fraction of a GPU's memory that a suggested layout may use."""

TFLOPS, NODE_GB_PER_SECOND, NETWORK_GB_PER_SECOND = 400.0, 300.0, 40.0
"""Used where ``[cluster]`` does not say; only the order of the suggestions depends on them."""


@dataclass(frozen=True)
class LayoutSuggestion:
    """A layout that fits into memory.

    Attributes:
        words: the settings to write, as ``key=value``.
        layout: sizes of the mesh axes.
        bytes: peak memory per rank.
        seconds: estimated seconds per optimizer step.
        why: where the estimated time goes.
    """

    words: tuple[str, ...]
    layout: ParallelLayout
    bytes: int
    seconds: float
    why: str


def suggest(
    loaded: Loaded[Run], family: Family, sizes: ModelSizes, ranks: int, memory_bytes: float
) -> list[LayoutSuggestion]:
    """Return layouts of ``ranks`` ranks that fit into ``memory_bytes`` per GPU, fastest first.

    Only layouts that ``check_layout`` accepts are suggested.
    """
    found = []
    for words, run in _candidates(loaded.run, sizes, ranks):
        layout = layout_of(run.parallel, ranks, run.model.megatron)
        if check_layout(Loaded(run, {}), layout, sizes, on_gloo=False):
            continue
        batches = batch_sizes(run, layout)
        if batches.longest > run.train.tokens_per_microbatch:
            continue
        work = full_microbatch(run, batches.longest, fused=True)
        memory = fullest(stage_memory(run, family, layout, work, microbatches_per_rank(batches, layout)))
        if memory.total <= MEMORY_FRACTION * memory_bytes:
            found.append(_rated(run, family, layout, batches, words, memory.total))
    return sorted(found, key=lambda each: (each.seconds, each.bytes))


def _candidates(run: Run, sizes: ModelSizes, ranks: int) -> Iterator[tuple[tuple[str, ...], Run]]:
    node = run.slurm.gpus_per_node or 8
    powers = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= ranks]
    pipelines = [size for size in range(1, 17) if ranks % size == 0]
    experts = powers if sizes.experts else [1]
    for tensor, pipeline, context, expert in product(powers, pipelines, (1, 2, 4), experts):
        if tensor > node or ranks % (tensor * pipeline * context) or ranks % (expert * pipeline):
            continue
        for recompute in ("selective",) if "recompute_modules" in run.model.megatron else RECOMPUTES:
            axes = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
            yield _candidate(run, sizes.layers, axes, recompute)


def _candidate(run: Run, layers: int, axes: dict[str, int], recompute: str) -> tuple[tuple[str, ...], Run]:
    """Return a run with these axes and its settings; the last stage is shorter if the pipeline does not divide."""
    megatron = {name: value for name, value in run.model.megatron.items() if name not in (FIRST, LAST)}
    words = [f"parallel.{name}={value}" for name, value in axes.items()]
    pipeline = axes["pipeline"]
    if layers % pipeline:
        megatron[LAST] = layers - -(-layers // pipeline) * (pipeline - 1)
        words.append(f"model.megatron.{LAST}={megatron[LAST]}")
    parallel = run.parallel.model_copy(
        update={**axes, "virtual_pipeline": 1, "expert_tensor": None, "sequence": None, "ranks": None}
    )
    model = run.model.model_copy(update={"megatron": megatron, "recompute": recompute})
    return (*words, f"model.recompute={recompute}"), run.model_copy(update={"parallel": parallel, "model": model})


def _rated(
    run: Run, family: Family, layout: ParallelLayout, batches: BatchSizes, words: tuple[str, ...], memory: int
) -> LayoutSuggestion:
    compute, communication = update_seconds(run, family, layout, batches)
    idle = pipeline_bubble(layout, microbatches_per_rank(batches, layout))
    one_node = layout.expert * layout.expert_tensor <= (run.slurm.gpus_per_node or 8)
    why = [f"pipeline bubble {idle:.0%}"] if layout.pipeline > 1 else []
    why += [f"expert exchange {'within a node' if one_node else 'across nodes'}"] if layout.expert > 1 else []
    why += [f"communication {communication / (compute + communication):.0%}"]
    return LayoutSuggestion(words, layout, memory, (compute + communication) / (1 - idle), ", ".join(why))


def microbatches_per_rank(batches: BatchSizes, layout: ParallelLayout) -> int:
    """Return the micro-batches per rank and optimizer step if every sequence has the maximum length."""
    return max(batches.max_rows // max(layout.data, 1), 1)


def update_seconds(run: Run, family: Family, layout: ParallelLayout, batches: BatchSizes) -> tuple[float, float]:
    """Return the estimated seconds of computation and of communication per optimizer step, without overlap.

    Communication within a node counts at ``node_gb_per_second``, otherwise at ``network_gb_per_second``. Neighboring
    ranks form tensor groups, then context or expert groups, then data, then pipeline: megatron-core's order.
    """
    cluster, microbatches = run.cluster, microbatches_per_rank(batches, layout)
    work = full_microbatch(run, batches.longest, fused=True)
    cost = step_cost(run, family, longest=batches.longest, prompt=0)
    tokens = microbatches * layout.data * work.tokens
    slowdown = 1.0
    if family.num_experts:  # the busiest experts delay all others
        fraction = expert_fraction(family, batches.longest)
        imbalance = cluster.expert_imbalance if layout.expert > 1 else 1.0
        slowdown = 1 - fraction + fraction * imbalance / expert_efficiency(family, layout, work)
    rate = layout.ranks * (cluster.gpu_tflops or TFLOPS) * 1e12 * cluster.mfu
    compute = tokens * cost.train_flops / cost.tokens * slowdown / rate
    return compute, communication_seconds(run, layout, rank_traffic(run, family, layout, work, microbatches))


def communication_seconds(run: Run, layout: ParallelLayout, traffic: RankTraffic) -> float:
    """Return the seconds that a rank sends, one axis after the other."""
    node = run.slurm.gpus_per_node or 8
    within_node = 1e9 * (run.cluster.node_gb_per_second or NODE_GB_PER_SECOND)
    network = 1e9 * (run.cluster.network_gb_per_second or NETWORK_GB_PER_SECOND)

    def bandwidth(span: int) -> float:
        return within_node if span <= node else network

    return (
        traffic.tensor / bandwidth(layout.tensor)
        + traffic.expert / bandwidth(layout.expert * layout.expert_tensor)
        + traffic.pipeline / bandwidth(layout.ranks if layout.ranks > node else 1)
        + traffic.data / bandwidth(layout.tensor * layout.context * layout.data)
    )
