"""Tables of memory, step cost and suggested layouts that ``megatron-rl check`` prints."""

from collections.abc import Sequence

from rich.table import Table

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import Recompute, exchanged_bytes
from megatron_rl.launch.planning.estimate import RunEstimate
from megatron_rl.launch.planning.memory import GIB, RankMemory, fullest
from megatron_rl.launch.planning.parameters import active_parameters, total_parameters
from megatron_rl.launch.planning.reshard import describe_direct_push
from megatron_rl.launch.planning.step_cost import pipeline_bubble
from megatron_rl.launch.planning.suggest import LayoutSuggestion

SHOWN_SUGGESTIONS = 5


def memory_table(run: Run, estimate: RunEstimate) -> Table:
    """Return the memory per rank of the fullest pipeline stage by category, and the free memory of a GPU."""
    memory = fullest(estimate.memories)
    stage, stages = memory.stage, estimate.layout.pipeline
    name = f", pipeline stage {stage.index} of {stages} ({len(stage.layers)} layers), the fullest" if stages > 1 else ""
    table = Table("category", "GiB", "what", title=f"Memory per rank{name}", title_justify="left")
    for category, amount, what in memory_rows(run, estimate, memory):
        table.add_row(category, "" if amount is None else format_gib(amount), what)
    return table


def memory_rows(run: Run, estimate: RunEstimate, memory: RankMemory) -> list[tuple[str, float | None, str]]:
    """Return (category, bytes, explanation) of the memory table; bytes are None in rows without an amount."""
    counts, activations, work = memory.counts, memory.activations, estimate.work
    measured = "transformer-engine's layers, not measured" if work.fused else "local layers, measured on a CPU"
    experts = f", {counts.expert:,} of them in experts of this rank" if counts.expert else ""
    flights = f"{activations.in_flight} micro-batch(es) in flight, " if estimate.layout.pipeline > 1 else ""
    moments = _describe_optimizer(run)
    has_exchange = estimate.layout.expert > 1
    imbalance = f", busiest experts {run.cluster.expert_imbalance:g} times the average" if has_exchange else ""
    modules = Recompute.of(run.model).modules
    recompute = f"recompute = {run.model.recompute}" + (f" ({', '.join(sorted(modules))})" if modules else "")
    tiles = f"vocabulary operation in {activations.tiles} tile(s)" if activations.tiles else "none on this stage"
    rows: list[tuple[str, float | None, str]] = [
        ("parameters", memory.parameters, f"{counts.total:,} in {run.model.dtype}{experts}"),
        ("gradients", memory.gradients, "reduced in place" if work.fused else "reduced through a copy, on gloo"),
        ("optimizer", memory.optimizer, moments + (" and main weights" if work.dtype_bytes < 4 else "")),
        ("activations", activations.saved, f"saved: {flights}{work.tokens} tokens per row, {recompute}"),
        ("", activations.working, f"working: one layer or the vocabulary operation{imbalance}; {measured}"),
        ("logits", None, f"never stored: {tiles}" if activations.tiles else tiles),
        ("communication", None, _communication(estimate, memory)),
    ]
    if memory.reduction:
        rows.append(("reduction", memory.reduction, "gloo's copy of the gradients, after activations are freed"))
    stack = " and one tensor with all experts of a layer" if estimate.family.stacked_names else ""
    push = f"weights.bucket_bytes{stack}, between steps, after activations are freed"
    rows.append(("weight push", memory.push, push))
    if memory.host_reference:
        host = f"{format_gib(memory.host_reference)} GiB of host memory, twice that while it computes log-probs"
        rows.append(("reference policy", None, host))
    if memory.host_optimizer:
        host = f"{format_gib(memory.host_optimizer)} GiB of host memory: moments, weights and gradients; not measured"
        rows.append(("offloaded optimizer", None, host))
    columns = estimate.columns
    host = f"{format_gib(columns.local)} GiB of host memory, {columns.per_token} bytes per own token; rank 0 also"
    rows.append(("token columns", None, f"{host} {format_gib(columns.main)} GiB for the whole step"))
    if memory.reserved:
        rows.append(("reserved", memory.reserved, "assumed: CUDA context, NCCL, allocator fragmentation"))
    rows.append(("peak", memory.total, ""))
    if estimate.memory_bytes is None and work.fused:
        rows.append(("free", None, "unknown: set cluster.gpu_memory_gib, or add a config of configs/cluster"))
    if estimate.memory_bytes is not None:
        free = estimate.memory_bytes - memory.total
        verdict = "fits" if free >= 0 else "DOES NOT FIT: use a layout listed below, or more nodes"
        rows.append(("free", free, f"of {format_gib(estimate.memory_bytes)} GiB per GPU; {verdict}"))
    return rows


def _describe_optimizer(run: Run) -> str:
    fields = run.optimizer.megatron
    shard = "shard of the moments" if run.parallel.distributed_optimizer else "all moments"
    kind = "momentum of matrices, Adam's moments of the rest" if fields.get("optimizer") == "muon" else shard
    lowered = [f"{name} {value}" for name, value in fields.items() if name.endswith("_dtype")]
    return kind + (f" ({', '.join(lowered)})" if lowered else "")


def step_table(run: Run, estimate: RunEstimate) -> Table:
    """Return FLOPs, bytes and expected times per step at the maximum sequence length."""
    title = "Cost per step at the maximum sequence length"
    table = Table("per step", "", title=title, title_justify="left", show_header=False)
    for name, text in step_rows(run, estimate):
        table.add_row(name, text)
    return table


def step_rows(run: Run, estimate: RunEstimate) -> list[tuple[str, str]]:
    """Return (name, text) of the cost table."""
    cost, cluster, family, sent = estimate.cost, run.cluster, estimate.family, estimate.traffic
    total, active = total_parameters(family), active_parameters(family)
    idle = pipeline_bubble(estimate.layout, estimate.microbatches)
    rows = [
        ("parameters", f"{total / 1e9:,.2f} G, {active / 1e9:,.2f} G active per token"),
        ("tokens", f"{cost.tokens:,}"),
        ("log-probs", f"{cost.logprob_flops:.3g} FLOPs"),
        ("training", f"{cost.train_flops:.3g} FLOPs"),
        ("generation", f"{cost.generate_flops:.3g} FLOPs"),
        ("", f"{format_gib(cost.cache_bytes)} GiB of KV cache{_decoding(run, estimate)}"),
        (
            "sent per rank",
            f"GiB per optimizer step: tensor {format_gib(sent.tensor)}, expert {format_gib(sent.expert)}, pipeline"
            f" {format_gib(sent.pipeline)}, data {format_gib(sent.data)}",
        ),
    ]
    if estimate.layout.pipeline > 1:
        rows.append(("pipeline bubble", f"{idle:.1%}"))
    if cluster.gpu_tflops is not None:
        rate = estimate.layout.ranks * cluster.gpu_tflops * 1e12 * cluster.mfu
        seconds = (cost.logprob_flops + cost.train_flops) / rate / (1 - idle)
        speed = f"{seconds:,.1f} s, {cost.tokens / seconds:,.0f} tokens/s"
        assumed = f"at cluster.mfu = {cluster.mfu:g} of {cluster.gpu_tflops:g} TFLOP/s"
        rows.append(("log-probs, training", f"{speed} {assumed}"))
    if cluster.network_gb_per_second is not None:
        rows.append(("weight push", _push(run, estimate, cluster.network_gb_per_second)))
        direct = describe_direct_push(
            run,
            estimate.family,
            estimate.layout,
            dtype_bytes=4 if run.model.dtype == "float32" else 2,
            servers=_servers(run),
            gb_per_second=cluster.network_gb_per_second,
        )
        rows += [("", direct)] if direct else []
    return rows


def suggestions_table(suggestions: Sequence[LayoutSuggestion]) -> Table:
    """Return the fastest of the layouts that fit."""
    title = f"Layouts that fit, fastest first by a rough estimate ({len(suggestions)} found)"
    table = Table("settings", "GiB", "seconds", "why", title=title, title_justify="left")
    for each in suggestions[:SHOWN_SUGGESTIONS]:
        table.add_row(" ".join(each.words), format_gib(each.bytes), f"{each.seconds:.0f}", each.why)
    return table


def format_gib(amount: float) -> str:
    """Return bytes as GiB with one, two or four decimals."""
    value = amount / GIB
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"


def _communication(estimate: RunEstimate, memory: RankMemory) -> str:
    text = "gradient reduction and weight gathering work in place"
    if not estimate.family.num_experts or set(memory.stage.layers) <= set(estimate.family.dense_layers):
        return text
    buffers = exchanged_bytes(estimate.sizes, estimate.layout, estimate.work)
    return f"{text}; {format_gib(buffers)} GiB of tokens sent to and from experts are part of working"


def _decoding(run: Run, estimate: RunEstimate) -> str:
    """Return a lower bound of the decoding time: the memory reads of the fleet's GPUs."""
    gpus, servers = run.slurm.rollout_nodes * run.slurm.gpus_per_node, _servers(run)
    if run.cluster.gpu_gb_per_second is None or not gpus or not servers:
        return ""
    seconds = estimate.cost.decode_bytes(servers) / (gpus * 1e9 * run.cluster.gpu_gb_per_second)
    return f"; {gpus} GPUs need at least {seconds:,.0f} s of memory reads to decode all responses together"


def _push(run: Run, estimate: RunEstimate, gb_per_second: float) -> str:
    size, servers = estimate.cost.weight_bytes, _servers(run)
    if run.weights.carrier == "disk" or (run.weights.carrier == "auto" and run.rollout.engine == "vllm"):
        return f"{format_gib(size)} GiB written by all ranks in parallel and read by each server, at disk speed"
    if run.weights.carrier == "stages":
        seconds = size / 1e9 / gb_per_second
        stages = f"{run.parallel.pipeline} stage(s) at the same time to {servers} server(s)"
        return f"{format_gib(size)} GiB from {stages}: {seconds:,.1f} s at {gb_per_second:g} GB/s of a server's link"
    seconds = size * (1 + servers) / 1e9 / gb_per_second
    speed = f"cluster.network_gb_per_second = {gb_per_second:g}"
    return f"{format_gib(size)} GiB to the main rank, then to {servers} server(s): {seconds:,.1f} s at {speed}"


def _servers(run: Run) -> int:
    return len(run.rollout.urls) or run.rollout.servers
