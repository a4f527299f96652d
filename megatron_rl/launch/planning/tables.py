"""The plan in numbers, as tables for people."""

from collections.abc import Sequence

from rich.table import Table

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import exchanged_bytes
from megatron_rl.launch.planning.flops import bubble
from megatron_rl.launch.planning.memory import GIB, RankMemory, worst
from megatron_rl.launch.planning.memory_plan import Sizes
from megatron_rl.launch.planning.parameters import active_parameters, total_parameters
from megatron_rl.launch.planning.suggest import Suggestion
from megatron_rl.launch.planning.widths import widths_of

SHOWN_SUGGESTIONS = 5


def memory_table(run: Run, sizes: Sizes) -> Table:
    """Return what a rank of the fullest pipeline stage holds, by category, and what is left of a GPU."""
    memory = worst(sizes.memories)
    title = f"Memory of a rank of {_stage(sizes, memory)}"
    table = Table("category", "GiB", "what", title=title, title_justify="left")
    for name, amount, what in memory_rows(run, sizes, memory):
        table.add_row(name, "" if amount is None else gib(amount), what)
    return table


def memory_rows(run: Run, sizes: Sizes, memory: RankMemory) -> list[tuple[str, float | None, str]]:
    """Return (category, bytes, words) of the memory table; bytes are None where a row only says something."""
    counts, activations, work = memory.counts, memory.activations, sizes.work
    kernels = "transformer-engine's layers, not measured" if work.fused else "local layers, as measured on a CPU"
    experts = f", of them {counts.expert:,} experts' that other ranks do not hold" if counts.expert else ""
    flights = f"{activations.in_flight} micro-batch(es) in flight, " if sizes.layout.pipeline > 1 else ""
    shares = "a share" if run.parallel.distributed_optimizer else "all"
    imbalance = f", busiest experts {run.cluster.expert_imbalance:g} times the average" if _has_exchange(sizes) else ""
    rows: list[tuple[str, float | None, str]] = [
        ("parameters", memory.parameters, f"{counts.total:,} in {run.model.dtype}{experts}"),
        ("gradients", memory.gradients, "reduced in place" if work.fused else "reduced through a copy, on gloo"),
        ("optimizer", memory.optimizer, f"{shares} of the moments{' and float32 weights' if work.bytes < 4 else ''}"),
        ("activations", activations.kept, f"kept: {flights}{work.row} tokens a row, recompute = {run.model.recompute}"),
        ("", activations.working, f"at work: one layer or the vocabulary operation{imbalance}; {kernels}"),
        ("logits", None, _tiles(activations.tiles)),
        ("communication", None, _communication(sizes, memory)),
    ]
    if memory.reduction:
        rows.append(("reduction", memory.reduction, "gloo's copy of the gradients, when activations are gone"))
    stack = " and one tensor with a layer's experts" if sizes.family.stacks else ""
    rows.append(("weight push", memory.push, f"weights.bucket_bytes{stack}, between steps, when activations are gone"))
    if memory.host_reference:
        rows.append(
            ("reference policy", None, f"{gib(memory.host_reference)} GiB of host memory, twice that in scoring")
        )
    if memory.reserved:
        rows.append(("reserved", memory.reserved, "assumed: CUDA context, NCCL, gaps of the allocator"))
    rows.append(("most at a time", memory.total, ""))
    if sizes.memory_bytes is None and work.fused:
        rows.append(
            ("left of a GPU", None, "unknown: set cluster.gpu_memory_gib, or add an overlay of configs/cluster")
        )
    if sizes.memory_bytes is not None:
        left = sizes.memory_bytes - memory.total
        words = "fits" if left >= 0 else "DOES NOT FIT: see the layouts below, or more nodes"
        rows.append(("left of a GPU", left, f"of {gib(sizes.memory_bytes)} GiB; {words}"))
    return rows


def step_table(run: Run, sizes: Sizes) -> Table:
    """Return operations, bytes and expected times of a step, if every sequence is the longest."""
    table = Table("a step", "", title="Work, if every sequence is the longest", title_justify="left", show_header=False)
    for name, words in step_rows(run, sizes):
        table.add_row(name, words)
    return table


def step_rows(run: Run, sizes: Sizes) -> list[tuple[str, str]]:
    """Return (what, words) of the table of a step's work."""
    step, cluster, family = sizes.step, run.cluster, sizes.family
    sent = sizes.traffic
    total, active = total_parameters(family), active_parameters(family)
    rows = [
        ("parameters", f"{total / 1e9:,.2f} G, {active / 1e9:,.2f} G at work on a token"),
        ("tokens", f"{step.tokens:,}"),
        ("score", f"{step.score:.3g} operations"),
        ("train", f"{step.train:.3g} operations"),
        ("generate", f"{step.generate:.3g} operations"),
        (
            "",
            f"{gib(step.cache_bytes)} GiB of keys and values{_decoding(run, sizes)}",
        ),
        (
            "a rank sends",
            f"in an optimizer step, GiB: tensor {gib(sent.tensor)}, expert {gib(sent.expert)}, pipeline"
            f" {gib(sent.pipeline)}, data {gib(sent.data)}",
        ),
    ]
    if sizes.layout.pipeline > 1:
        rows.append(("pipeline", f"{bubble(sizes.layout, sizes.rows):.1%} of its time is waiting"))
    if cluster.gpu_tflops is not None:
        rate = sizes.layout.ranks * cluster.gpu_tflops * 1e12 * cluster.mfu
        seconds = (step.score + step.train) / rate / (1 - bubble(sizes.layout, sizes.rows))
        said = f"at cluster.mfu = {cluster.mfu:g} of {cluster.gpu_tflops:g} TFLOP/s"
        rows.append(("score and train", f"{seconds:,.1f} s, {step.tokens / seconds:,.0f} tokens/s {said}"))
    if cluster.network_gb_per_second is not None:
        rows.append(("weight push", _push(run, sizes, cluster.network_gb_per_second)))
    return rows


def suggestions_table(suggestions: Sequence[Suggestion]) -> Table:
    """Return the best of the layouts that fit."""
    title = f"Layouts that fit, fastest first by an estimate ({len(suggestions)} found)"
    table = Table("settings", "GiB", "seconds", "why", title=title, title_justify="left")
    for each in suggestions[:SHOWN_SUGGESTIONS]:
        table.add_row(" ".join(each.words), gib(each.bytes), f"{each.seconds:.0f}", each.why)
    return table


def gib(amount: float) -> str:
    """Return bytes as GiB, with as many digits as say something."""
    value = amount / GIB
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _stage(sizes: Sizes, memory: RankMemory) -> str:
    stage = memory.stage
    if sizes.layout.pipeline == 1:
        return "the only stage"
    return f"pipeline stage {stage.index} of {sizes.layout.pipeline} ({len(stage.layers)} layers), the fullest"


def _has_exchange(sizes: Sizes) -> bool:
    return sizes.layout.expert > 1


def _communication(sizes: Sizes, memory: RankMemory) -> str:
    words = "gradient buckets and the gather of new weights work in place"
    if not sizes.family.num_experts or all(layer in sizes.family.dense_layers for layer in memory.stage.layers):
        return words
    buffers = exchanged_bytes(widths_of(sizes.family), sizes.layout, sizes.work)
    return f"{words}; tokens to and from experts {gib(buffers)} GiB, part of what is at work"


def _tiles(tiles: int) -> str:
    return f"none: the vocabulary operation has {tiles} tile(s) of them at a time" if tiles else "none on this stage"


def _decoding(run: Run, sizes: Sizes) -> str:
    """Return how long the fleet's GPUs at least read, if all responses are decoded at once."""
    bandwidth, gpus, servers = (
        run.cluster.gpu_gb_per_second,
        run.slurm.rollout_nodes * run.slurm.gpus_per_node,
        _servers(run),
    )
    if bandwidth is None or not gpus or not servers:
        return ""
    seconds = sizes.step.decode_bytes(servers) / (gpus * 1e9 * bandwidth)
    return f"; to decode them all at once {gpus} GPUs read for at least {seconds:,.0f} s"


def _push(run: Run, sizes: Sizes, gb_per_second: float) -> str:
    bytes_, said = sizes.step.weight_bytes, f"cluster.network_gb_per_second = {gb_per_second:g}"
    if run.weights.carrier == "disk" or (run.weights.carrier == "auto" and run.rollout.engine == "vllm"):
        return f"{gib(bytes_)} GiB into files by all ranks at once, then read by each server: as fast as the disk"
    seconds = bytes_ * (1 + _servers(run)) / 1e9 / gb_per_second
    return f"{gib(bytes_)} GiB to the main rank, then to {_servers(run)} server(s): {seconds:,.1f} s at {said}"


def _servers(run: Run) -> int:
    return len(run.rollout.urls) or run.rollout.servers
