"""The plan of direct weight pushes for the layouts of a run."""

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.models.reshard.layouts import EngineLayout, TrainerLayout
from megatron_rl.models.reshard.plan import reshard_plan

_TENSOR_OPTIONS = ("tp_size", "tensor_parallel_size", "tp")
_EXPERT_OPTIONS = ("ep_size", "expert_parallel_size", "ep")
_MAX_TENSORS = 20_000
"""Larger models are not planned here: it would take more than a few seconds."""


def trainer_layout(layout: ParallelLayout, layers: int) -> TrainerLayout:
    """Return which ranks hold which weights; virtual stages are dealt out to the stages in turn."""
    if layout.is_uneven:
        stages = [stage for stage, count in enumerate(layout.stage_sizes(layers)) for _ in range(count)]
    else:
        per_chunk = layers // (layout.pipeline * layout.virtual_pipeline)
        stages = [layer // per_chunk % layout.pipeline for layer in range(layers)]
    return TrainerLayout(
        layout.ranks,
        layout.tensor,
        layout.pipeline,
        layout.context,
        layout.expert,
        layout.expert_tensor,
        stages,
    )


def engine_layout(run: Run) -> EngineLayout | None:
    """Return the layout of the run's SGLang servers, as far as ``rollout.sglang`` says it; None for other engines."""
    if run.rollout.engine != "sglang":
        return None
    tensor, expert = (_option(run, names) for names in (_TENSOR_OPTIONS, _EXPERT_OPTIONS))
    return EngineLayout(tensor, expert)


def _option(run: Run, names: tuple[str, ...]) -> int:
    return next((int(run.rollout.sglang[name]) for name in names if name in run.rollout.sglang), 1)


def describe_direct_push(
    run: Run, family: Family, layout: ParallelLayout, *, dtype_bytes: int, servers: int, gb_per_second: float
) -> str | None:
    """Return the bytes per link, and the time, of pushes from shard to shard; None if these cannot be planned."""
    engine = engine_layout(run)
    if engine is None or not servers or len(family.hf_shapes()) > _MAX_TENSORS:
        return None
    try:
        plan = reshard_plan(family, trainer_layout(layout, family.num_layers), engine)
    except DataError:
        return None
    sent, received = (max(elements) * dtype_bytes / 1e9 for elements in (plan.sent, plan.received))
    seconds = max(sent * servers, received) / gb_per_second
    return (
        f"from shard to shard, which no transport does yet, {seconds:,.2f} s: a trainer rank would send at most"
        f" {sent:,.3g} GB to each of {servers} server(s), a rank of a server would receive {received:,.3g} GB"
    )
