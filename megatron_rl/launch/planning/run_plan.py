"""The plan of a run: its layout and batches, and every problem that can be found before a process starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_rl.algorithms.objectives.base import Clipped
from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.sources import raise_problems
from megatron_rl.config.tasks import ChainedArithmeticTask, JsonlTask
from megatron_rl.distributed.mesh import on_cuda
from megatron_rl.errors import MegatronRLError
from megatron_rl.launch.planning.encoding import check_encoding
from megatron_rl.launch.planning.fleet_checks import (
    check_checkpoint_format,
    check_fleet,
    check_tied_head,
)
from megatron_rl.launch.planning.inspection import Inspection, inspect_inputs
from megatron_rl.launch.planning.layout import ParallelLayout, check_layout, layout_of
from megatron_rl.launch.planning.megatron_fields import (
    check_family_fields,
    check_megatron_fields,
    check_muon,
    check_on_gloo,
    check_recompute,
)
from megatron_rl.launch.planning.model_sizes import ModelSizes, model_sizes
from megatron_rl.launch.planning.setting_checks import check_learning, check_settings, setting_warnings
from megatron_rl.models.checkpoint_folders import has_weights, open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.observability.sinks import missing_packages
from megatron_rl.tasks import check_task
from megatron_rl.tasks.reward import runs_code
from megatron_rl.util.megatron_version import untested_megatron


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes of a run.

    Attributes:
        responses: responses per step.
        per_update: responses per optimizer step.
        longest: maximum sequence length, in tokens, padded for context parallelism.
        max_rows: packed rows per optimizer step, over all data-parallel ranks, if every sequence has that length.
        updates: optimizer steps of the run.
    """

    responses: int
    per_update: int
    longest: int
    max_rows: int
    updates: int


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run that has no problems.

    Attributes:
        notes: unusual settings that work.
        warnings: settings that run but are likely to train badly.
        missing: inputs that are not on this machine and need not be.
    """

    layout: ParallelLayout
    sizes: ModelSizes
    batches: BatchSizes
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    """What was found out about a run before it starts.

    Attributes:
        plan: the plan, if there is no problem.
        running: problems with which the run would end.
        learning: problems with which the run would learn nothing.
        warnings: what works and is probably a mistake.
        facts: what was looked at.
    """

    plan: RunPlan | None
    running: tuple[str, ...]
    learning: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: tuple[str, ...]

    def require(self) -> RunPlan:
        """Return the plan.

        Raises:
            ConfigError: the run cannot work; the message lists all problems.
        """
        raise_problems([*self.running, *self.learning])
        assert self.plan is not None, "a run without problems has a plan"
        return self.plan


Inspected = Literal["nothing", "sample", "all"]
"""Which prompts are tokenized by ``examine``; ``nothing`` builds no tokenizer either."""


def make_plan(
    loaded: Loaded[Run],
    ranks: int | None = None,
    *,
    on_gloo: bool | None = None,
    starts_here: bool = True,
    inspected: Inspected = "nothing",
) -> RunPlan:
    """Return the plan of a run; see ``examine``.

    Raises:
        ConfigError: the run cannot work; the message lists all problems.
    """
    return examine(loaded, ranks, on_gloo=on_gloo, starts_here=starts_here, inspected=inspected).require()


def examine(
    loaded: Loaded[Run],
    ranks: int | None = None,
    *,
    on_gloo: bool | None = None,
    starts_here: bool = True,
    inspected: Inspected = "nothing",
) -> Examination:
    """Return the problems and the plan of a run.

    Args:
        loaded: the configuration.
        ranks: number of trainer ranks that torchrun or srun starts; None: as configured.
        on_gloo: whether ranks communicate through gloo; None: if this machine has no GPU.
        starts_here: whether weights, prompts and the servers' interpreter must be on this machine.
        inspected: prompts to render and tokenize.
    """
    run, problems, missing = loaded.run, list(check_megatron_fields(loaded)), list[str]()
    if not run.model.untested_megatron and (refusal := untested_megatron()) is not None:
        problems.append(refusal)
    layout = layout_of(run.parallel, ranks, run.model.megatron)
    batches = batch_sizes(run, layout)
    sizes = None
    try:
        hf = read_hf_config(Path(run.model.path))
        problems += [*check_tied_head(loaded, hf), *check_encoding(loaded)]
        family = family_of(hf)
        sizes = model_sizes(family)
        problems += check_family_fields(loaded, family.fields)
        if starts_here or has_weights(Path(run.model.path)):
            open_checkpoint(Path(run.model.path), family).check(family)
        else:
            missing.append(f"{loaded.describe('model.path')}: no weights")
    except MegatronRLError as error:
        problems.append(str(error))
    if sizes is not None:
        problems += _check_sizes(loaded, layout, batches, sizes, on_gloo=not on_cuda() if on_gloo is None else on_gloo)
    problems += [*check_settings(loaded, sizes), *_check_updates(loaded)]
    problems += check_muon(loaded) if starts_here else []
    python = run.rollout.sglang_python
    if starts_here or not python or Path(python).exists():
        problems += check_fleet(loaded)
    else:
        missing.append(loaded.describe("rollout.sglang_python"))
    problems += check_checkpoint_format(loaded)
    problems += [f"{_sink_key(loaded, name)} {why}" for name, why in missing_packages(run.log)]
    if starts_here or not isinstance(run.task, JsonlTask) or Path(run.task.path).exists():
        problems += check_task(run.task, run.reward, run.environment, reads_files=inspected == "nothing")
    else:
        missing.append(loaded.describe("task.path"))
    looks = inspected != "nothing"
    inspection = inspect_inputs(loaded, sizes, full=inspected == "all") if looks else Inspection()
    problems += inspection.running
    learning = (*check_learning(loaded), *inspection.learning)
    warnings = (*_warnings(loaded), *setting_warnings(loaded), *inspection.warnings)
    plan = None
    if sizes is not None and not problems and not learning:
        plan = RunPlan(layout, sizes, batches, tuple(_notes(loaded, layout, batches)), warnings, tuple(missing))
    return Examination(plan, tuple(problems), learning, warnings, tuple(inspection.facts))


def _check_sizes(
    loaded: Loaded[Run], layout: ParallelLayout, batches: BatchSizes, sizes: ModelSizes, *, on_gloo: bool
) -> Iterator[str]:
    yield from check_layout(loaded, layout, sizes, on_gloo=on_gloo)
    yield from check_recompute(loaded, sizes, on_gloo=on_gloo)
    if on_gloo:
        yield from check_on_gloo(loaded)
    yield from _check_lengths(loaded, batches, sizes)
    yield from _check_routing_replay(loaded, sizes)


def check_sampling(loaded: Loaded[Run]) -> None:
    """Check what sampling needs: the model, the servers, the task and the rewards.

    Raises:
        ConfigError: sampling cannot work; the message lists all problems.
    """
    path = Path(loaded.run.model.path)
    try:
        hf = read_hf_config(path)
        problems = [*check_tied_head(loaded, hf), *check_fleet(loaded)]
        family = family_of(hf)
        open_checkpoint(path, family).check(family)
    except MegatronRLError as error:
        problems = [str(error), *check_fleet(loaded)]
    raise_problems([*problems, *check_task(loaded.run.task, loaded.run.reward, loaded.run.environment)])


def max_prompt_tokens(run: Run) -> int:
    """Return the maximum prompt length of the task, in tokens."""
    if isinstance(run.task, ChainedArithmeticTask):
        return 2 * run.task.max_operations + 2  # a digit, operators and digits, an equals sign
    return run.task.max_prompt_tokens


def batch_sizes(run: Run, layout: ParallelLayout) -> BatchSizes:
    """Return the batch sizes of a run."""
    responses = run.train.prompts_per_step * run.train.group_size
    per_update = -(-responses // run.train.updates_per_step)
    longest = max_prompt_tokens(run) + run.rollout.sampling.max_new_tokens
    longest = _round_up(longest, run.parallel.sequence_multiple)
    fitting = run.train.tokens_per_microbatch // longest if run.train.packing else 1
    rows = -(-per_update // max(fitting, 1))
    max_rows = _round_up(rows, max(layout.data, 1) * run.parallel.microbatch_multiple)
    return BatchSizes(responses, per_update, longest, max_rows, run.train.steps * run.train.updates_per_step)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_updates(loaded: Loaded[Run]) -> Iterator[str]:
    train = loaded.run.train
    responses = train.prompts_per_step * train.group_size
    if responses % train.updates_per_step:
        sizes = [size for size in range(1, responses + 1) if responses % size == 0]
        below = max(size for size in sizes if size < train.updates_per_step)
        above = min((size for size in sizes if size > train.updates_per_step), default=below)
        yield (
            f"{loaded.describe('train.updates_per_step')} does not divide the"
            f" {responses} responses of a step (prompts_per_step {train.prompts_per_step} * group_size"
            f" {train.group_size}); write {below} or {above}"
        )


def _check_lengths(loaded: Loaded[Run], batches: BatchSizes, sizes: ModelSizes) -> Iterator[str]:
    run = loaded.run
    parts = f"prompt {max_prompt_tokens(run)} + rollout.sampling.max_new_tokens {run.rollout.sampling.max_new_tokens}"
    if run.train.tokens_per_microbatch < batches.longest:
        yield (
            f"{loaded.describe('train.tokens_per_microbatch')} is less than the longest sequence, {batches.longest}"
            f" tokens ({parts}); write at least {batches.longest}"
        )
    longest = max_prompt_tokens(run) + run.rollout.sampling.max_new_tokens
    if longest > sizes.positions:
        room = sizes.positions - max_prompt_tokens(run)
        fix = (
            f"write at most {room}"
            if room > 0
            else f"lower it or task.max_prompt_tokens: together at most {sizes.positions}"
        )
        yield (
            f"{loaded.describe('rollout.sampling.max_new_tokens')}: the longest sequence has {longest}"
            f" tokens ({parts}), but the model's maximum is {sizes.positions}; {fix}"
        )


def _check_routing_replay(loaded: Loaded[Run], sizes: ModelSizes) -> Iterator[str]:
    if loaded.run.rollout.routing_replay == "none":
        return
    setting = loaded.describe("rollout.routing_replay")
    if not sizes.experts:
        yield f"{setting}, but the model has no experts; leave it out"
    if loaded.run.model.megatron.get("moe_router_fusion"):
        yield f"{setting}: megatron-core's fused router cannot replay; leave model.megatron.moe_router_fusion out"


def _sink_key(loaded: Loaded[Run], name: str) -> str:
    key = "log.prometheus_port" if name == "prometheus" else "log.sinks"
    return f"{key} ({loaded.origin(key)}): {name}"


def _notes(loaded: Loaded[Run], layout: ParallelLayout, batches: BatchSizes) -> Iterator[str]:
    run = loaded.run
    sampling = run.rollout.sampling
    if (sampling.top_p < 1 or sampling.top_k not in (-1, 0)) and not sampling.keep_mask:
        yield (
            "top_p or top_k truncate the distribution: the engine's log-probs will differ from the trainer's;"
            " rollout.sampling.keep_mask = true restricts the trainer's to the same tokens"
        )
    if run.train.updates_per_step == 1 and run.objective.meant_for_several_updates:
        yield f"one update per step: all ratios are 1, {run.objective.label} never clips; updates_per_step = 4 is usual"
    if run.reward.allow_code and runs_code(run.task, run.reward):
        yield "programs that the model writes run on this machine; docs/tasks.md describes the limits of their sandbox"
    if layout.data > batches.per_update:
        yield f"{layout.data} data-parallel ranks share {batches.per_update} responses per update: some ranks have none"


def _warnings(loaded: Loaded[Run]) -> Iterator[str]:
    run, objective = loaded.run, loaded.run.objective
    if objective.ratio_to_rollout and run.correction.kind in ("tis", "mis", "icepop"):
        yield (
            f"{loaded.describe('correction.kind')} weighs tokens by the ratio to the rollout policy, as the ratio of"
            f" {objective.label} does already: the mismatch is corrected twice; write correction.kind ="
            ' "none", and gates for a bound on the mismatch'
        )
    if not run.rollout.max_lag or run.correction.kind != "none" or objective.ratio_to_rollout:
        return
    lag = loaded.describe("rollout.max_lag")
    warning = f'{lag}, but older samples are not corrected (correction.kind = "none"); write correction.kind = "tis"'
    if run.train.updates_per_step > 1 and not objective.bounds_ratios:
        warning += " or objective.dual_clip = 3, or both" if isinstance(objective, Clipped) else ""
        warning += (
            f": {objective.label} does not bound a ratio from above where the advantage is negative; if a token sampled"
            " with older weights is very unlikely under newer ones, the updates of one step may raise its ratio, and"
            " with it loss and gradient, without limit"
        )
    yield warning
