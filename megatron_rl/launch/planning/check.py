"""``megatron-rl check``: what was found, what the layout is, what a step does, and where every setting comes from."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_rl.config.load import Loaded, settings
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.memory_plan import Sizes, planned_ranks, plans_gpus, sizes_of, suggestions_for
from megatron_rl.launch.planning.plan import Batches, make_plan, max_prompt_tokens
from megatron_rl.launch.planning.shape import Shape
from megatron_rl.launch.planning.tables import memory_table, step_table, suggestions_table
from megatron_rl.observability.versions import OPTIONAL, found_versions

OPTIONAL_USE = {
    "transformer-engine": "layers of megatron-core on GPUs; without it the local ones are used",
    "apex": "fused kernels that megatron-core uses where it finds them",
    "flash-attn": "attention of transformer-engine, which looks for it",
    "liger-kernel": "compared with in benchmarks; not needed",
    "sglang": "not needed here: it has an environment of its own",
    "vllm": "not needed here: it has an environment of its own",
    "layers": "this and the next six rows: for a model in bfloat16 on this machine",
    "vocabulary operation": "log-probs and entropies from the output layer, where it has more than one tile of rows",
}


def check(loaded: Loaded[Run] | None, ranks: int | None = None) -> int:
    """Print everything about a configuration; return 0, or raise a ConfigError that lists all problems."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(versions_table())
    if loaded is None:
        return 0
    console.print(settings_table(loaded))
    ranks = ranks or planned_ranks(loaded)
    sizes = sizes_of(loaded, ranks)
    if sizes is not None:
        _print_sizes(console, loaded, sizes)
    plan = make_plan(loaded, ranks, on_gloo=not plans_gpus(loaded))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    console.print("ok: nothing found that would stop this run")
    return 0


def _print_sizes(console: Console, loaded: Loaded[Run], sizes: Sizes) -> None:
    """Print what follows from the model's config.json alone: whatever else is missing, this much is known."""
    run = loaded.run
    console.print(layout_table(sizes.layout, sizes.shape))
    console.print(batch_table(run, sizes.batches))
    console.print(memory_table(run, sizes))
    console.print(step_table(run, sizes))
    if suggestions := suggestions_for(loaded, sizes):
        console.print(suggestions_table(suggestions))
    elif sizes.memory_bytes is not None:
        console.print(f"no layout of {sizes.layout.ranks} ranks fits; ask for more, or for fewer tokens a row")


def versions_table() -> Table:
    """Return what was found on this machine."""
    table = Table("software", "found", "use", title="Software", title_justify="left")
    for name, version in found_versions().items():
        missing = "not found" if name in OPTIONAL or name in ("cuda", "gpus", "c++ compiler") else "MISSING"
        table.add_row(name, version or missing, OPTIONAL_USE.get(name, ""), style=None if version else "dim")
    return table


def settings_table(loaded: Loaded[Run]) -> Table:
    """Return the resolved configuration; settings that are not left at their default say where they were set."""
    table = Table("setting", "value", "set in", title="Configuration", title_justify="left")
    for key, value, _ in settings(loaded.run):
        origins = [place for other, place in loaded.origins.items() if other == key or other.startswith(f"{key}.")]
        origin = ", ".join(dict.fromkeys(origins))
        table.add_row(key, _worded(value), origin or "default", style=None if origin else "dim")
    return table


def _worded(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_worded(inner)}" for name, inner in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(_worded, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def layout_table(layout: Layout, shape: Shape) -> Table:
    """Return each axis, its size, and what it divides."""
    table = Table("axis", "size", "each rank holds", title=f"Layout: {layout.ranks} ranks", title_justify="left")
    padded = -(-shape.vocabulary // layout.tensor) * layout.tensor
    share = (
        f"{shape.heads // layout.tensor} of {shape.heads} heads, {shape.kv_heads // layout.tensor} of {shape.kv_heads}"
    )
    rows = f"{padded // layout.tensor} of {shape.vocabulary} vocabulary rows"
    if padded != shape.vocabulary:
        rows += f" (padded to {padded})"
    chunks = layout.pipeline * layout.virtual_pipeline
    table.add_row("tensor", str(layout.tensor), f"{share} key-value heads, {rows}")
    table.add_row(
        "sequence", "on" if layout.sequence else "off", "activations between layers, shared over the tensor axis"
    )
    table.add_row("pipeline", str(layout.pipeline), f"{_stage_layers(layout, shape)} of {shape.layers} layers")
    table.add_row("virtual_pipeline", str(layout.virtual_pipeline), f"chunks of {shape.layers // chunks} layers")
    table.add_row("context", str(layout.context), f"1/{layout.context} of each sequence")
    table.add_row("data", str(layout.data), f"1/{layout.data} of the rows")
    if shape.experts:
        width = shape.expert_ffn // layout.expert_tensor
        table.add_row("expert", str(layout.expert), f"{shape.experts // layout.expert} of {shape.experts} experts")
        table.add_row(
            "expert_tensor", str(layout.expert_tensor), f"{width} of {shape.expert_ffn} columns of each expert"
        )
        table.add_row("expert_data", str(layout.expert_data), "copies of each expert")
    return table


def _stage_layers(layout: Layout, shape: Shape) -> str:
    if not layout.is_uneven:
        return str(shape.layers // layout.pipeline)
    sizes = layout.stage_sizes(shape.layers)
    return (
        f"{sizes[0]}, last stage {sizes[-1]},"
        if len(set(sizes[:-1])) == 1
        else f"{sizes[0]}, then {sizes[1]}, last {sizes[-1]},"
    )


def batch_table(run: Run, batches: Batches) -> Table:
    """Return the batch arithmetic."""
    train = run.train
    table = Table("a step", "", title="Batches", title_justify="left", show_header=False)
    table.add_row("prompts * responses each", f"{train.prompts_per_step} * {train.group_size} = {batches.responses}")
    table.add_row("optimizer steps", f"{train.updates_per_step}, of {batches.per_update} responses each")
    prompt, new = max_prompt_tokens(run), run.rollout.sampling.max_new_tokens
    table.add_row("longest sequence", f"prompt {prompt} + response {new}, padded to {batches.longest} tokens")
    packed = "packed" if train.packing else "one sequence each"
    table.add_row(
        "rows of an optimizer step", f"at most {batches.most_rows} of {train.tokens_per_microbatch} tokens, {packed}"
    )
    table.add_row("the run", f"{train.steps} steps, {batches.updates} optimizer steps")
    return table
