"""Layouts of the same ranks that fit, fastest first by a simple estimate; never one that ``check_layout`` refuses."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.flops import (
    Traffic,
    bubble,
    expert_efficiency,
    expert_share,
    step_of,
    traffic_of,
)
from megatron_rl.launch.planning.layout import FIRST, LAST, Layout, check_layout, layout_of
from megatron_rl.launch.planning.memory import memory_of, work_of, worst
from megatron_rl.launch.planning.plan import Batches, batches_of
from megatron_rl.launch.planning.shape import Shape
from megatron_rl.models.hf_mapping.rules import Family

RECOMPUTES = ("none", "selective", "full")

ROOM = 0.95
"""Share of a GPU's memory that a suggestion may fill."""


TFLOPS, NODE_GB_PER_SECOND, NETWORK_GB_PER_SECOND = 400.0, 300.0, 40.0
"""What the estimate takes where ``[cluster]`` says nothing: only the order of suggestions depends on them."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Attributes:
        words: the settings that make it, to write in a config.
        layout: its axes.
        bytes: of the fullest rank.
        seconds: of an optimizer step, by the estimate below.
        why: what it spends its time on.
    """

    words: tuple[str, ...]
    layout: Layout
    bytes: int
    seconds: float
    why: str


def suggest(loaded: Loaded[Run], family: Family, shape: Shape, ranks: int, memory_bytes: float) -> list[Suggestion]:
    """Return layouts of so many ranks that fit into so much memory of a GPU, the fastest first."""
    found = []
    for words, run in _candidates(loaded.run, shape, ranks):
        layout = layout_of(run.parallel, ranks, run.model.megatron)
        if check_layout(Loaded(run, {}), layout, shape, on_gloo=False):
            continue
        batches = batches_of(run, layout)
        if batches.longest > run.train.tokens_per_microbatch:
            continue
        work = work_of(run, layout, batches.longest, fused=True)
        memory = worst(memory_of(run, family, layout, work, rows_of(batches, layout)))
        if memory.total <= ROOM * memory_bytes:
            found.append(_rated(run, family, layout, batches, words, memory.total))
    return sorted(found, key=lambda each: (each.seconds, each.bytes))


def _candidates(run: Run, shape: Shape, ranks: int) -> Iterator[tuple[tuple[str, ...], Run]]:
    node = run.slurm.gpus_per_node or 8
    powers = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= ranks]
    pipelines = [size for size in range(1, 17) if ranks % size == 0]
    experts = powers if shape.experts else [1]
    for tensor, pipeline, context, expert in product(powers, pipelines, (1, 2, 4), experts):
        if tensor > node or ranks % (tensor * pipeline * context) or ranks % (expert * pipeline):
            continue
        for recompute in RECOMPUTES:
            yield _candidate(run, shape, (tensor, pipeline, context, expert), recompute)


def _candidate(run: Run, shape: Shape, sizes: tuple[int, ...], recompute: str) -> tuple[tuple[str, ...], Run]:
    """Return a run of these sizes and the words that make it; where a pipeline does not divide it ends short."""
    tensor, pipeline, context, expert = sizes
    named = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
    megatron = {name: value for name, value in run.model.megatron.items() if name not in (FIRST, LAST)}
    words = [f"parallel.{name}={value}" for name, value in named.items()]
    if shape.layers % pipeline:
        megatron[LAST] = shape.layers - -(-shape.layers // pipeline) * (pipeline - 1)
        words.append(f"model.megatron.{LAST}={megatron[LAST]}")
    parallel = run.parallel.model_copy(
        update={**named, "virtual_pipeline": 1, "expert_tensor": None, "sequence": None, "ranks": None}
    )
    model = run.model.model_copy(update={"megatron": megatron, "recompute": recompute})
    return (*words, f"model.recompute={recompute}"), run.model_copy(update={"parallel": parallel, "model": model})


def _rated(run: Run, family: Family, layout: Layout, batches: Batches, words: tuple[str, ...], used: int) -> Suggestion:
    rows = rows_of(batches, layout)
    computing, moving = update_seconds(run, family, layout, batches)
    waiting = bubble(layout, rows)
    spans = "within a node" if layout.expert * layout.expert_tensor <= (run.slurm.gpus_per_node or 8) else "over nodes"
    said = [f"{waiting:.0%} of the pipeline's time is waiting"] if layout.pipeline > 1 else []
    said += [f"tokens go to experts {spans}"] if layout.expert > 1 else []
    said += [f"{moving / (computing + moving):.0%} of the time is exchange"]
    return Suggestion(words, layout, used, (computing + moving) / (1 - waiting), "; ".join(said))


def rows_of(batches: Batches, layout: Layout) -> int:
    """Return the micro-batches of a rank in an optimizer step."""
    return max(batches.most_rows // max(layout.data, 1), 1)


def update_seconds(run: Run, family: Family, layout: Layout, batches: Batches) -> tuple[float, float]:
    """Return the seconds that a rank computes and those that it sends in an optimizer step: nothing overlaps.

    Sending within a node counts by ``node_gb_per_second``, else by ``network_gb_per_second``. Ranks of a tensor group
    are neighbours, then those of a context or an expert group, then data, then pipeline: megatron-core's order.
    """
    cluster, rows = run.cluster, rows_of(batches, layout)
    work = work_of(run, layout, batches.longest, fused=True)
    per_token = _train_per_token(run, family, batches.longest)
    tokens = rows * layout.data * work.row
    slower = 1.0
    if family.num_experts:  # experts with more tokens than the average hold the others up
        share = expert_share(family, batches.longest)
        busiest = cluster.expert_imbalance if layout.expert > 1 else 1.0
        slower = 1 - share + share * busiest / expert_efficiency(family, layout, work)
    peak = (cluster.gpu_tflops or TFLOPS) * 1e12 * cluster.mfu
    computing = tokens * per_token * slower / (layout.ranks * peak)
    sent = traffic_of(run, family, layout, work, rows)
    return computing, sending_seconds(run, layout, sent)


def sending_seconds(run: Run, layout: Layout, sent: Traffic) -> float:
    """Return the seconds that a rank sends, one axis after the other."""
    node = run.slurm.gpus_per_node or 8
    near = 1e9 * (run.cluster.node_gb_per_second or NODE_GB_PER_SECOND)
    far = 1e9 * (run.cluster.network_gb_per_second or NETWORK_GB_PER_SECOND)

    def pace(span: int) -> float:
        return near if span <= node else far

    dense = layout.tensor * layout.context * layout.data
    return (
        sent.tensor / pace(layout.tensor)
        + sent.expert / pace(layout.expert * layout.expert_tensor)
        + sent.pipeline / pace(layout.ranks if layout.ranks > node else 1)
        + sent.data / pace(dense)
    )


def _train_per_token(run: Run, family: Family, longest: int) -> float:
    step = step_of(run, family, longest=longest, prompt=0)
    return step.train / step.tokens
