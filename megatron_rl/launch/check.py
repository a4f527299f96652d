"""``megatron-rl check``: the verdict on a configuration, its problems, and its plan; starts nothing."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_rl.config.load import Loaded, settings
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.attention import describe_attention
from megatron_rl.launch.planning.estimate import (
    RunEstimate,
    estimate_run,
    planned_ranks,
    plans_gpus,
    suggestions_for,
)
from megatron_rl.launch.planning.fit import MemoryFit, describe_misfit, memory_fit
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.launch.planning.run_plan import BatchSizes, examine, max_prompt_tokens
from megatron_rl.launch.planning.tables import memory_table, step_table, suggestions_table
from megatron_rl.launch.server_forms import check_server_forms
from megatron_rl.launch.versions import OPTIONAL, found_versions
from megatron_rl.util.console import make_console
from megatron_rl.util.exit_codes import USER_ERROR

SOFTWARE_USE = {
    "transformer-engine": "layers on GPUs; without it, megatron-core's local layers",
    "apex": "fused kernels that megatron-core uses if present",
    "flash-attn": "attention of transformer-engine, if present",
    "liger-kernel": "compared with in benchmarks",
    "sglang": "runs in a separate environment",
    "vllm": "runs in a separate environment",
    "layers": "this row and the next six: for a bfloat16 model on this machine",
    "vocabulary operation": "log-probs and entropies from the output layer, with more than one tile of rows",
}


def check(
    loaded: Loaded[Run] | None, ranks: int | None = None, *, full: bool = False, shows_settings: bool = False
) -> int:
    """Print the verdict on a configuration, its problems and its tables, or without one the software versions.

    Args:
        loaded: the configuration.
        ranks: number of trainer ranks; None: as configured.
        full: whether to tokenize all prompts instead of a sample.
        shows_settings: whether to print the software versions and all settings too.

    Returns:
        The exit code that ``train`` would have: ``USER_ERROR`` if there is a problem.
    """
    console = make_console()
    if loaded is None:
        console.print(versions_table())
        return 0
    ranks = ranks or planned_ranks(loaded)
    estimate = estimate_run(loaded, ranks)
    examination = examine(loaded, ranks, on_gloo=not plans_gpus(loaded), inspected="all" if full else "sample")
    fit = None if estimate is None else memory_fit(loaded, estimate)
    running, notes = list(examination.running), list(examination.facts)
    if examination.plan is not None:
        notes = [*examination.plan.notes, *notes]
        try:
            notes += check_server_forms(loaded)
        except ConfigError as error:
            running.append(str(error))
    problems = [] if fit is None or fit.fits else [describe_misfit(fit)]
    problems += [*running, *examination.learning]
    for line in verdict(fit, len(running), len(examination.learning)):
        console.print(line, markup=False, soft_wrap=True, style="bold")
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True, style="red")
    for warning in examination.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True, style="yellow")
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if shows_settings:
        console.print(versions_table())
        console.print(settings_table(loaded))
    if estimate is not None:
        _print_estimate(console, loaded, estimate)
    return USER_ERROR if problems else 0


def verdict(fit: MemoryFit | None, running: int, learning: int) -> list[str]:
    """Return three lines: whether the run fits into memory, runs, and can learn, with the numbers of problems."""
    unknown = "whether it fits is unknown: the model, the layout or the memory of a GPU (cluster.gpu_memory_gib) is not"
    return [
        f"{unknown} known" if fit is None else f"fits: {fit}" if fit.fits else f"does not fit: {fit}",
        f"does not run: {_count(running)}" if running else "runs",
        f"cannot learn: {_count(learning)}" if learning else "learns" + ", if it runs" * bool(running),
    ]


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


def _print_estimate(console: Console, loaded: Loaded[Run], estimate: RunEstimate) -> None:
    """Print the tables that need only the configuration and ``config.json``."""
    run = loaded.run
    console.print(layout_table(estimate.layout, estimate.sizes))
    console.print(batch_table(run, estimate.batches))
    console.print(memory_table(run, estimate))
    console.print(step_table(run, estimate))
    if suggestions := suggestions_for(loaded, estimate):
        console.print(suggestions_table(suggestions))
    elif estimate.memory_bytes is not None:
        console.print(f"no layout of {estimate.layout.ranks} ranks fits; use more ranks, or fewer tokens per row")
    if not plans_gpus(loaded):
        return
    if run.train.deterministic is None:
        console.print("train.deterministic: default, off on GPUs; true repeats bit for bit and limits attention")
    for line in describe_attention(run, estimate.layout, estimate.sizes, estimate.batches.longest):
        console.print(line, markup=False)


def versions_table() -> Table:
    """Return the software versions of this machine."""
    table = Table("software", "found", "use", title="Software", title_justify="left")
    for name, version in found_versions().items():
        missing = "not found" if name in OPTIONAL or name in ("cuda", "gpus", "c++ compiler") else "MISSING"
        table.add_row(name, version or missing, SOFTWARE_USE.get(name, ""), style=None if version else "dim")
    return table


def settings_table(loaded: Loaded[Run]) -> Table:
    """Return all settings, each with the place where it was set."""
    table = Table("setting", "value", "set in", title="Configuration", title_justify="left")
    for key, value, _ in settings(loaded.run):
        origins = [place for other, place in loaded.origins.items() if other == key or other.startswith(f"{key}.")]
        origin = ", ".join(dict.fromkeys(origins))
        table.add_row(key, _format_value(value), origin or "default", style=None if origin else "dim")
    return table


def _format_value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_format_value(inner)}" for name, inner in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(_format_value, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def layout_table(layout: ParallelLayout, sizes: ModelSizes) -> Table:
    """Return the size of each mesh axis and the part of the model that a rank holds."""
    title = f"Layout: {layout.ranks} ranks"
    table = Table("axis", "size", "per rank", title=title, title_justify="left")
    padded = -(-sizes.vocabulary // layout.tensor) * layout.tensor
    heads = f"{sizes.heads // layout.tensor} of {sizes.heads} heads"
    kv_heads = f"{sizes.kv_heads // layout.tensor} of {sizes.kv_heads} key-value heads"
    rows = f"{padded // layout.tensor} of {sizes.vocabulary} vocabulary rows"
    if padded != sizes.vocabulary:
        rows += f" (padded to {padded})"
    chunks = layout.pipeline * layout.virtual_pipeline
    table.add_row("tensor", str(layout.tensor), f"{heads}, {kv_heads}, {rows}")
    sequence = "activations between layers are sharded over the tensor axis"
    table.add_row("sequence", "on" if layout.sequence else "off", sequence)
    table.add_row("pipeline", str(layout.pipeline), f"{_stage_layers(layout, sizes)} of {sizes.layers} layers")
    table.add_row("virtual_pipeline", str(layout.virtual_pipeline), f"chunks of {sizes.layers // chunks} layers")
    table.add_row("context", str(layout.context), f"1/{layout.context} of each sequence")
    table.add_row("data", str(layout.data), f"1/{layout.data} of the rows")
    if sizes.experts:
        width = f"{sizes.expert_ffn // layout.expert_tensor} of {sizes.expert_ffn} columns of each expert"
        table.add_row("expert", str(layout.expert), f"{sizes.experts // layout.expert} of {sizes.experts} experts")
        table.add_row("expert_tensor", str(layout.expert_tensor), width)
        table.add_row("expert_data", str(layout.expert_data), "replicas of each expert")
    return table


def _stage_layers(layout: ParallelLayout, sizes: ModelSizes) -> str:
    if not layout.is_uneven:
        return str(sizes.layers // layout.pipeline)
    first, *middle, last = layout.stage_sizes(sizes.layers)
    if set(middle) <= {first}:
        return f"{first}, last stage {last},"
    return f"{first}, then {middle[0]}, last {last},"


def batch_table(run: Run, batches: BatchSizes) -> Table:
    """Return the batch sizes."""
    train = run.train
    table = Table("per step", "", title="Batches", title_justify="left", show_header=False)
    responses = f"{train.prompts_per_step} * {train.group_size} = {batches.responses}"
    table.add_row("prompts * responses per prompt", responses)
    table.add_row("optimizer steps", f"{train.updates_per_step}, with {batches.per_update} responses each")
    prompt, new = max_prompt_tokens(run), run.rollout.sampling.max_new_tokens
    table.add_row("maximum length", f"prompt {prompt} + response {new}, padded to {batches.longest} tokens")
    packed = "packed" if train.packing else "one sequence each"
    rows = f"at most {batches.max_rows} of {train.tokens_per_microbatch} tokens, {packed}"
    table.add_row("rows per optimizer step", rows)
    table.add_row("whole run", f"{train.steps} steps, {batches.updates} optimizer steps")
    return table
