"""Checks of ``model.megatron`` and ``optimizer.megatron`` against megatron-core's dataclasses, without importing it."""

import ast
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import MegatronValue, Run
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.util.megatron_version import megatron_release

DTYPES = ("float32", "bfloat16", "float16", "uint8")
"""How a setting writes a dtype of torch."""


@dataclass(frozen=True, eq=False)
class MegatronClass:
    """A configuration class of megatron-core and this package's rules for its fields.

    Attributes:
        name: name of the class.
        section: setting that holds its fields.
        sources: file below the package and class for each part of its definition.
        set_elsewhere: fields that other settings of this package decide.
        fixed: fields that cannot be set, and why.
        choices: fields of which only some values are supported.
        reason: why other values are not supported.
    """

    name: str
    section: str
    sources: tuple[tuple[str, str], ...]
    set_elsewhere: Mapping[str, str]
    fixed: Mapping[str, str]
    choices: Mapping[str, tuple[str, ...]]
    reason: str


TRANSFORMER = MegatronClass(
    name="TransformerConfig",
    section="model.megatron",
    sources=(
        ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
        ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
        ("megatron/core/transformer/transformer_config.py", "MLATransformerConfig"),
    ),
    set_elsewhere={
        "tensor_model_parallel_size": "parallel.tensor",
        "pipeline_model_parallel_size": "parallel.pipeline",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "context_parallel_size": "parallel.context",
        "expert_model_parallel_size": "parallel.expert",
        "expert_tensor_parallel_size": "parallel.expert_tensor",
        "sequence_parallel": "parallel.sequence",
        "params_dtype": "model.dtype",
        "pipeline_dtype": "model.dtype",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
        "recompute_granularity": "model.recompute",
        "overlap_p2p_comm": "parallel.virtual_pipeline",
        "batch_p2p_comm": "parallel.virtual_pipeline",
        "moe_enable_routing_replay": "rollout.routing_replay",
    },
    fixed={
        "attention_dropout": "log-probs must be equal before and during training",
        "hidden_dropout": "log-probs must be equal before and during training",
        "calculate_per_token_loss": "the loss already contains its global denominators",
        "finalize_model_grads_func": "the loss already contains its global denominators",
        "moe_z_loss_coeff": "megatron-core averages it per shard, so it would depend on the layout",
        "moe_expert_capacity_factor": "the dropped tokens would depend on the layout and differ from the engine's",
        "moe_input_jitter_eps": "log-probs must be equal before and during training",
    },
    choices={"moe_router_load_balancing_type": ("none", "aux_loss")},
    reason="gives gradients that depend on the layout",
)

_HALF = "only float16 needs loss scaling"
_FP8 = "FP8 is not supported"

OPTIMIZER = MegatronClass(
    name="OptimizerConfig",
    section="optimizer.megatron",
    sources=(("megatron/core/optimizer/optimizer_config.py", "OptimizerConfig"),),
    set_elsewhere={
        "lr": "optimizer.lr",
        "min_lr": "optimizer.min_lr",
        "weight_decay": "optimizer.weight_decay",
        "adam_beta1": "optimizer.beta1",
        "adam_beta2": "optimizer.beta2",
        "adam_eps": "optimizer.epsilon",
        "clip_grad": "optimizer.clip_grad",
        "params_dtype": "model.dtype",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
        "use_distributed_optimizer": "parallel.distributed_optimizer",
    },
    fixed={
        "loss_scale": _HALF,
        "initial_loss_scale": _HALF,
        "min_loss_scale": _HALF,
        "loss_scale_window": _HALF,
        "hysteresis": _HALF,
        "fp8_recipe": _FP8,
        "reuse_grad_buf_for_mxfp8_param_ag": _FP8,
        "overlap_param_gather_with_optimizer_step": "weights would be read before they are gathered",
        "use_layer_wise_distributed_optimizer": "checkpoints cannot be written from its shards",
        "grad_norm_skip_threshold": "a skipped update would be counted and scheduled as one that was taken",
        "timers": "it is an object of megatron-core's own training loop",
    },
    choices={"optimizer": ("adam", "muon"), "muon_scalar_optimizer": ("adam",)},
    reason="has an optimizer state that checkpoints do not store",
)


@cache
def megatron_fields(described: MegatronClass) -> Mapping[str, ast.expr]:
    """Return the fields of a class of the installed megatron-core with their types; empty if it is not installed."""
    try:
        megatron = distribution("megatron-core")
    except PackageNotFoundError:
        return {}
    fields: dict[str, ast.expr] = {}
    for file, class_name in described.sources:
        tree = ast.parse(Path(str(megatron.locate_file(file))).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        fields |= {
            node.target.id: node.annotation
            for node in body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    return fields


def check_megatron_fields(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the problems of the settings in ``model.megatron`` and ``optimizer.megatron``."""
    yield from _check_class(loaded, TRANSFORMER, loaded.run.model.megatron)
    yield from _check_class(loaded, OPTIMIZER, loaded.run.optimizer.megatron)
    yield from _check_optimizer(loaded)
    yield from _check_offload(loaded)


def _check_class(loaded: Loaded[Run], described: MegatronClass, values: Mapping[str, MegatronValue]) -> Iterator[str]:
    known = megatron_fields(described)
    for name, value in values.items():
        setting = loaded.describe(f"{described.section}.{name}")
        if name in described.set_elsewhere:
            yield f"{setting} is decided by {described.set_elsewhere[name]}; set that instead"
        elif name in described.fixed:
            yield f"{setting} cannot be set: {described.fixed[name]}; leave it out"
        elif name in described.choices and value not in described.choices[name]:
            yield f"{setting} {described.reason}; write {' or '.join(described.choices[name])}"
        elif known and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"see {described.name} in megatron-core's documentation"
            yield f"unknown key {setting}: megatron-core's {described.name} has no such field; {hint}"
        elif known and not accepts(known[name], value):
            yield f"{setting} has the wrong type: {described.name}.{name} is {ast.unparse(known[name])}"


def accepts(annotation: ast.expr, value: object) -> bool:
    """Return whether a value of a setting has the annotated type; a dtype is written as its name."""
    match annotation:
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Attribute(attr="dtype"):
            return value in DTYPES
        case ast.BinOp(left=left, right=right):
            return accepts(left, value) or accepts(right, value)
        case ast.Subscript(value=ast.Name(id=kind), slice=inner):
            return _accepts_parts(kind, inner.elts if isinstance(inner, ast.Tuple) else [inner], value)
    return False


def _accepts_parts(kind: str, parts: list[ast.expr], value: object) -> bool:
    if kind in ("Optional", "Union"):
        return any(accepts(part, value) for part in parts)
    if kind == "Literal":
        return any(isinstance(part, ast.Constant) and part.value == value for part in parts)
    if kind in ("List", "list", "Sequence"):
        return isinstance(value, list) and all(accepts(parts[0], each) for each in value)
    if kind in ("Tuple", "tuple") and isinstance(value, list):
        parts = parts[:1] * len(value) if isinstance(parts[-1], ast.Constant) else parts
        return len(parts) == len(value) and all(map(accepts, parts, value))
    return False


def _check_optimizer(loaded: Loaded[Run]) -> Iterator[str]:
    run, fields = loaded.run, loaded.run.optimizer.megatron

    def setting(name: str) -> str:
        return loaded.describe(f"optimizer.megatron.{name}")

    distributed = run.parallel.distributed_optimizer
    if fields.get("optimizer") == "muon":
        if distributed:
            yield f"{setting('optimizer')} needs whole matrices; set parallel.distributed_optimizer = false"
        if fields.get("muon_tp_mode") == "blockwise" and run.parallel.tensor > 1:
            yield f"{setting('muon_tp_mode')} gives updates that depend on parallel.tensor; write duplicated"
    if fields.get("overlap_param_gather") and not (distributed and run.parallel.overlap_grad_reduce):
        yield (
            f"{setting('overlap_param_gather')} needs parallel.distributed_optimizer = true and"
            " parallel.overlap_grad_reduce = true"
        )
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if fields.get(name) and not distributed:
            yield f"{setting(name)} needs parallel.distributed_optimizer = true"
    lowered = [name for name in fields if name.endswith("_dtype") and fields[name] != "float32"]
    if lowered and not fields.get("use_precision_aware_optimizer"):
        yield f"{setting(lowered[0])} needs optimizer.megatron.use_precision_aware_optimizer = true"


def _check_offload(loaded: Loaded[Run]) -> Iterator[str]:
    run, fields = loaded.run, loaded.run.optimizer.megatron
    if not fields.get("optimizer_cpu_offload"):
        return
    setting = loaded.describe("optimizer.megatron.optimizer_cpu_offload")
    if not fields.get("optimizer_offload_fraction"):
        yield (f"{setting} moves nothing to host memory; set optimizer.megatron.optimizer_offload_fraction, at most 1")
    if run.model.dtype != "bfloat16":
        yield (
            f'{setting} needs model.dtype = "bfloat16": megatron-core cannot offload shards of'
            " float32 parameters (ValueError: can't optimize a non-leaf Tensor)"
        )


def check_muon(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield what Muon lacks in this environment."""
    if loaded.run.optimizer.megatron.get("optimizer") != "muon":
        return
    setting = loaded.describe("optimizer.megatron.optimizer")
    if find_spec("emerging_optimizers") is None:
        yield f"{setting} needs the package emerging-optimizers; install it"
    if megatron_fields(OPTIMIZER) and megatron_release() < (0, 19):
        yield f"{setting} needs megatron-core 0.19; install it, or leave the setting out"


def check_on_gloo(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the settings of ``optimizer.megatron`` that ranks without a GPU cannot run."""
    reasons = {
        "optimizer_cpu_offload": "megatron-core's HybridDeviceOptimizer finds no parameter on a GPU (KeyError)",
        "use_precision_aware_optimizer": "it needs transformer-engine's FusedAdam (RuntimeError)",
    }
    for name, reason in reasons.items():
        if loaded.run.optimizer.megatron.get(name):
            yield f"{loaded.describe(f'optimizer.megatron.{name}')} needs a GPU: {reason}; leave it out"


RECOMPUTED_MODULES: Mapping[str, str] = {
    "core_attn": "",
    "layernorm": "",
    "mla_up_proj": "multi-head latent attention",
    "mlp": "dense layers",
    "moe": "experts",
    "moe_act": "experts of transformer-engine, on a GPU",
    "shared_experts": "a shared expert",
}
"""Values of ``recompute_modules``, and what a model must have for it."""


def check_recompute(loaded: Loaded[Run], sizes: ModelSizes, *, on_gloo: bool) -> Iterator[str]:
    """Yield the problems of ``model.megatron.recompute_modules`` for a model."""
    modules = loaded.run.model.megatron.get("recompute_modules")
    if not isinstance(modules, list):
        return
    setting = loaded.describe("model.megatron.recompute_modules")
    if loaded.run.model.recompute != "selective":
        yield f'{setting} needs model.recompute = "selective"'
    has = {
        "": True,
        "multi-head latent attention": bool(sizes.latent_rank),
        "dense layers": sizes.has_dense_layers,
        "experts": sizes.experts > 0,
        "experts of transformer-engine, on a GPU": sizes.experts > 0 and not on_gloo,
        "a shared expert": sizes.shared_ffn > 0,
    }
    for module in modules:
        if module not in RECOMPUTED_MODULES:
            yield f"{setting}: {module!r} is unknown; write some of {', '.join(RECOMPUTED_MODULES)}"
        elif not has[needed := RECOMPUTED_MODULES[str(module)]]:
            yield f"{setting}: {module} needs {needed}; leave it out"
    if "moe" in modules and "shared_experts" in modules:
        yield f"{setting}: moe contains shared_experts; leave one out"


CHOSEN_BY_USER = ("moe_router_bias_update_rate",)
"""Fields that a family sets, but that do not describe the model."""


def check_family_fields(loaded: Loaded[Run], fields: Mapping[str, object]) -> Iterator[str]:
    """Yield the settings of ``model.megatron`` that the model's config.json decides.

    Args:
        loaded: the configuration.
        fields: TransformerConfig fields of the model's family.
    """
    for name in loaded.run.model.megatron:
        if name in fields and name not in CHOSEN_BY_USER:
            yield f"{loaded.describe(f'model.megatron.{name}')} is decided by the model's config.json; leave it out"
