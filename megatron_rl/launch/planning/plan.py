"""What a run will do, from its configuration alone, and everything that cannot work, before a process starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.algorithms.objectives.base import Clipped
from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run
from megatron_rl.config.sources import raise_problems
from megatron_rl.config.tasks import ChainedArithmeticTask, JsonlTask
from megatron_rl.distributed.mesh import on_cuda
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.fleet.sglang import NEVER_TIED, wrong_options
from megatron_rl.launch.planning.layout import Layout, check_layout, layout_of
from megatron_rl.launch.planning.shape import Shape, shape_of
from megatron_rl.launch.planning.upstream import check_megatron_fields
from megatron_rl.models.checkpoint_folders import QUANTISATION, has_weights, open_source
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import HFConfig
from megatron_rl.models.torch_dist import is_torch_dist
from megatron_rl.observability.sinks import missing_packages
from megatron_rl.tasks import check_task
from megatron_rl.tasks.reward import runs_code

BOUNDED = ("sapo", "cispo", "dppo")
"""Objectives in which no ratio, however large, has a large gradient."""


@dataclass(frozen=True)
class Batches:
    """The arithmetic of a step.

    Attributes:
        responses: sampled in a step.
        per_update: responses of one optimizer step.
        longest: tokens of the longest possible sequence, as padded for context parallelism.
        most_rows: packed rows of one optimizer step, over all data-parallel ranks, if all sequences are the longest.
        updates: optimizer steps of the run.
    """

    responses: int
    per_update: int
    longest: int
    most_rows: int
    updates: int


@dataclass(frozen=True)
class Plan:
    """A run as far as it is known before it starts."""

    layout: Layout
    shape: Shape
    batches: Batches
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """What will run, and is likely to go wrong."""
    absent: tuple[str, ...] = ()
    """What the run reads and is not on this machine, where it need not be."""


def make_plan(
    loaded: Loaded[Run], ranks: int | None = None, *, on_gloo: bool | None = None, starts_here: bool = True
) -> Plan:
    """Return the plan of a run; a ConfigError lists everything that cannot work.

    Args:
        loaded: the configuration.
        ranks: trainer ranks that exist already (torchrun, srun); None: as configured.
        on_gloo: whether ranks talk through gloo; None: if there is no GPU.
        starts_here: whether weights, prompts and the servers' interpreter must be on this machine.
    """
    run, problems, absent = loaded.run, list(check_megatron_fields(loaded)), list[str]()
    layout = layout_of(run.parallel, ranks, run.model.megatron)
    batches = batches_of(run, layout)
    shape = None
    try:
        hf = read_hf_config(Path(run.model.path))
        problems += [*_tied(loaded, hf), *_quantised(loaded, hf)]
        family = family_of(hf)
        shape = shape_of(family)
        if starts_here or has_weights(Path(run.model.path)):
            open_source(Path(run.model.path), family).check(family)
        else:
            absent.append(f"model.path = {run.model.path!r} ({loaded.origin('model.path')}): no weights")
    except MegatronRLError as error:
        problems.append(str(error))
    if shape is not None:
        gloo = not on_cuda() if on_gloo is None else on_gloo
        problems += check_layout(loaded, layout, shape, on_gloo=gloo)
        problems += _lengths(loaded, batches, shape)
        problems += _replay(loaded, shape)
    problems += _batch(loaded)
    python = run.rollout.sglang_python
    if starts_here or not python or Path(python).exists():
        problems += _fleet(loaded)
    else:
        absent.append(f"rollout.sglang_python = {python!r} ({loaded.origin('rollout.sglang_python')})")
    problems += _start_checkpoint(loaded)
    problems += [f"{_sink_key(loaded, name)} {why}" for name, why in missing_packages(run.log)]
    if starts_here or not isinstance(run.task, JsonlTask) or Path(run.task.path).exists():
        problems += check_task(run.task, run.reward, run.environment)
    else:
        absent.append(f"task.path = {run.task.path!r} ({loaded.origin('task.path')})")
    raise_problems(problems)
    assert shape is not None, "a missing shape is a problem"
    notes, warnings = tuple(_notes(loaded, layout, batches)), tuple(_warnings(loaded))
    return Plan(layout, shape, batches, notes, warnings, tuple(absent))


def check_sampling(loaded: Loaded[Run]) -> None:
    """Raise a ConfigError with everything that fleet or task cannot do, whoever trains; see ``make_plan``."""
    path = Path(loaded.run.model.path)
    try:
        hf = read_hf_config(path)
        problems = [*_tied(loaded, hf), *_fleet(loaded)]
        family = family_of(hf)
        open_source(path, family).check(family)
    except MegatronRLError as error:
        problems = [str(error), *_fleet(loaded)]
    raise_problems([*problems, *check_task(loaded.run.task, loaded.run.reward, loaded.run.environment)])


def max_prompt_tokens(run: Run) -> int:
    """Return the tokens of the longest prompt that the task lets through."""
    if isinstance(run.task, ChainedArithmeticTask):
        return 2 * run.task.max_operations + 2  # a digit, operators and digits, an equals sign
    return run.task.max_prompt_tokens


def batches_of(run: Run, layout: Layout) -> Batches:
    """Return the batch arithmetic of a run."""
    responses = run.train.prompts_per_step * run.train.group_size
    per_update = -(-responses // run.train.updates_per_step)
    multiple = 2 * layout.context if layout.context > 1 else 1
    longest = _round_up(max_prompt_tokens(run) + run.rollout.sampling.max_new_tokens, multiple)
    fitting = run.train.tokens_per_microbatch // longest if run.train.packing else 1
    rows = -(-per_update // max(fitting, 1))
    stages = layout.pipeline if layout.virtual_pipeline > 1 else 1
    most_rows = _round_up(rows, max(layout.data, 1) * stages)
    return Batches(responses, per_update, longest, most_rows, run.train.steps * run.train.updates_per_step)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _batch(loaded: Loaded[Run]) -> Iterator[str]:
    train = loaded.run.train
    responses = train.prompts_per_step * train.group_size
    if responses % train.updates_per_step:
        sizes = [size for size in range(1, responses + 1) if responses % size == 0]
        below = max(size for size in sizes if size < train.updates_per_step)
        above = min((size for size in sizes if size > train.updates_per_step), default=below)
        yield (
            f"train.updates_per_step = {train.updates_per_step} ({loaded.origin('train.updates_per_step')}) does not"
            f" divide the {responses} responses of a step (prompts_per_step {train.prompts_per_step} * group_size"
            f" {train.group_size}); write {below} or {above}"
        )


def _lengths(loaded: Loaded[Run], batches: Batches, shape: Shape) -> Iterator[str]:
    run, key = loaded.run, "train.tokens_per_microbatch"
    tokens = run.train.tokens_per_microbatch
    parts = f"prompt {max_prompt_tokens(run)} + rollout.sampling.max_new_tokens {run.rollout.sampling.max_new_tokens}"
    if tokens < batches.longest:
        yield (
            f"{key} = {tokens} ({loaded.origin(key)}) is less than the longest sequence, {batches.longest} tokens"
            f" ({parts}); write at least {batches.longest}"
        )
    longest = max_prompt_tokens(run) + run.rollout.sampling.max_new_tokens
    if longest > shape.positions:
        key = "rollout.sampling.max_new_tokens"
        room = shape.positions - max_prompt_tokens(run)
        fix = (
            f"write at most {room}"
            if room > 0
            else f"lower it or task.max_prompt_tokens: together at most {shape.positions}"
        )
        yield (
            f"{key} = {run.rollout.sampling.max_new_tokens} ({loaded.origin(key)}): the longest sequence has {longest}"
            f" tokens ({parts}), but the model's positions end at {shape.positions}; {fix}"
        )


def _replay(loaded: Loaded[Run], shape: Shape) -> Iterator[str]:
    run, key = loaded.run, "rollout.routing_replay"
    mode = run.rollout.routing_replay
    said = f"{key} = {mode!r} ({loaded.origin(key)})"
    if mode == "none":
        return
    if not shape.experts:
        yield f"{said}, but the model has no experts; leave it out"
    if run.model.megatron.get("moe_router_fusion"):
        yield f"{said}: megatron-core's fused router replays nothing; leave model.megatron.moe_router_fusion out"


def _fleet(loaded: Loaded[Run]) -> Iterator[str]:
    rollout = loaded.run.rollout
    if not rollout.urls and not rollout.servers:
        yield (
            f"rollout.servers = 0 ({loaded.origin('rollout.servers')}) and rollout.urls is empty: nothing would sample;"
            " start at least one server or write the URLs of running ones"
        )
    if not rollout.urls and rollout.engine == "sglang":
        yield from _sglang(loaded)
    if not rollout.urls and rollout.engine == "vllm" and not rollout.vllm_python:
        origin = loaded.origin("rollout.engine")
        yield (
            f'rollout.engine = "{rollout.engine}" ({origin}) runs in an environment of its own; write its interpreter'
            " in rollout.vllm_python, or start the servers there and write their addresses in rollout.urls"
        )
    carrier = loaded.run.weights.carrier
    if rollout.engine == "vllm" and carrier not in ("auto", "disk"):
        said = f"weights.carrier = {carrier!r} ({loaded.origin('weights.carrier')})"
        yield f"{said}: vLLM reads weights from a folder only; write disk or auto"
    if rollout.engine == "sglang" and carrier == "ipc":
        said = f"weights.carrier = 'ipc' ({loaded.origin('weights.carrier')})"
        yield f"{said}: only the embedded server takes weights through shared memory; write distributed or auto"
    if rollout.router is not None and rollout.engine == "vllm":
        yield f"rollout.router ({loaded.origin('rollout.router')}) speaks SGLang's protocol, not vLLM's; leave it out"


def _sink_key(loaded: Loaded[Run], name: str) -> str:
    key = "log.prometheus_port" if name == "prometheus" else "log.sinks"
    return f"{key} ({loaded.origin(key)}): {name}"


def _tied(loaded: Loaded[Run], hf: HFConfig) -> Iterator[str]:
    if loaded.run.rollout.engine == "sglang" and hf.get("tie_word_embeddings") and hf.get("model_type") in NEVER_TIED:
        yield (
            f"model.path = {loaded.run.model.path!r} ({loaded.origin('model.path')}) ties its output head to the"
            f" embedding, which SGLang does not for {hf['model_type']}: its head would hold no weights; write the"
            " embedding as lm_head.weight too, and tie_word_embeddings = false in config.json"
        )


def _quantised(loaded: Loaded[Run], hf: HFConfig) -> Iterator[str]:
    rollout, settings = loaded.run.rollout, hf.get(QUANTISATION)
    if rollout.engine != "embedded" and not rollout.urls and settings:
        yield (
            f"model.path = {loaded.run.model.path!r} ({loaded.origin('model.path')}) is quantised"
            f" ({settings.get('quant_method')}): {rollout.engine} would serve it so, and pushes are not; write it"
            " without by tools/convert.py hf-to-megatron, then megatron-to-hf, and name that folder"
        )


def _start_checkpoint(loaded: Loaded[Run]) -> Iterator[str]:
    rollout = loaded.run.rollout
    if rollout.engine == "sglang" and not rollout.urls and is_torch_dist(Path(loaded.run.model.path)):
        yield (
            f"model.path = {loaded.run.model.path!r} ({loaded.origin('model.path')}) is a distributed checkpoint, which"
            " SGLang cannot read; convert it with tools/convert.py megatron-to-hf, or start servers on the checkpoint"
            " that it came from and write their addresses in rollout.urls"
        )


def _sglang(loaded: Loaded[Run]) -> Iterator[str]:
    rollout = loaded.run.rollout
    if not rollout.sglang_python:
        yield (
            f'rollout.engine = "sglang" ({loaded.origin("rollout.engine")}) runs in an environment of its own; write'
            " its interpreter in rollout.sglang_python, or start the servers there and write their addresses in"
            " rollout.urls"
        )
        return
    try:
        for name, why in wrong_options(rollout.sglang_python, rollout.sglang, rollout.environment):
            key = f"rollout.sglang.{name}"
            yield f"{key} ({loaded.origin(key)}) {why}"
    except ConfigError as error:
        yield f"rollout.sglang_python ({loaded.origin('rollout.sglang_python')}): {error}"


def _notes(loaded: Loaded[Run], layout: Layout, batches: Batches) -> Iterator[str]:
    run = loaded.run
    if run.rollout.sampling.top_p < 1 or run.rollout.sampling.top_k not in (-1, 0):
        yield "top_p or top_k cut the distribution: the engine's log-probs will differ from the trainer's"
    if run.train.updates_per_step == 1 and run.objective.name in ("espo", "gspo", "sspo", "sapo"):
        yield f"one update a step: every ratio is 1 and {run.objective.name} never clips; updates_per_step = 4 is usual"
    if run.reward.allow_code and runs_code(run.task, run.reward):
        yield "programs that the model writes run on this machine, in the sandbox of docs/tasks.md: read its limits"
    if run.train.group_size == 1 and run.advantage.kind != "dr":
        yield "groups of one response have no advantage: nothing would be learnt"
    if layout.data > batches.per_update:
        yield f"{layout.data} data-parallel ranks share {batches.per_update} responses an update: some have none"


def _warnings(loaded: Loaded[Run]) -> Iterator[str]:
    run, objective = loaded.run, loaded.run.objective
    if not run.rollout.max_lag or run.correction.kind != "none":
        return
    lag = f"rollout.max_lag = {run.rollout.max_lag} ({loaded.origin('rollout.max_lag')})"
    said = f'{lag}, but nothing corrects for older samples (correction.kind = "none"); write correction.kind = "tis"'
    dual_clip = isinstance(objective, Clipped)
    bounded = objective.name in BOUNDED or (dual_clip and objective.dual_clip is not None)
    if run.train.updates_per_step > 1 and not bounded:
        said += " or objective.dual_clip = 3, or both" if dual_clip else ""
        said += (
            f": {objective.name} does not bound a ratio from above where the advantage is negative, and a token that"
            " older weights sampled may be so unlikely under newer ones that the updates of one step multiply its"
            " probability without limit: loss and gradient with it"
        )
    yield said
