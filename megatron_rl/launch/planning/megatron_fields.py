"""Checks of ``model.megatron`` against the fields of megatron-core's TransformerConfig, without importing it."""

import ast
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Run

SET_ELSEWHERE: Mapping[str, str] = {
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
}
"""Fields of megatron-core that other settings of this package decide."""

FIXED: Mapping[str, str] = {
    "attention_dropout": "log-probs must be equal before and during training",
    "hidden_dropout": "log-probs must be equal before and during training",
    "calculate_per_token_loss": "the loss already contains its global denominators",
    "finalize_model_grads_func": "the loss already contains its global denominators",
    "moe_z_loss_coeff": "megatron-core averages it per shard, so it would depend on the layout",
    "moe_expert_capacity_factor": "the dropped tokens would depend on the layout and differ from the engine's",
    "moe_input_jitter_eps": "log-probs must be equal before and during training",
}
"""Fields of megatron-core that cannot be set, and why."""

CHOICES: Mapping[str, tuple[str, ...]] = {"moe_router_load_balancing_type": ("none", "aux_loss")}
"""Fields with the values that give the same gradient under every layout."""


@cache
def megatron_fields() -> frozenset[str]:
    """Return the field names of megatron-core's TransformerConfig; empty if it is not installed."""
    try:
        megatron = distribution("megatron-core")
    except PackageNotFoundError:
        return frozenset()
    files = ("megatron/core/model_parallel_config.py", "megatron/core/transformer/transformer_config.py")
    classes = ("ModelParallelConfig", "TransformerConfig")
    names: set[str] = set()
    for file, class_name in zip(files, classes, strict=True):
        tree = ast.parse(Path(str(megatron.locate_file(file))).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        names |= {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return frozenset(names)


def check_megatron_fields(loaded: Loaded[Run]) -> Iterator[str]:
    """Yield the problems of the settings in ``model.megatron``."""
    known = megatron_fields()
    for name, value in loaded.run.model.megatron.items():
        key = f"model.megatron.{name}"
        setting = loaded.describe(key)
        if name in SET_ELSEWHERE:
            yield f"{setting} is decided by {SET_ELSEWHERE[name]}; set that instead"
        elif name in FIXED:
            yield f"{setting} cannot be set: {FIXED[name]}; leave it out"
        elif name in CHOICES and value not in CHOICES[name]:
            yield f"{setting} gives gradients that depend on the layout; write {' or '.join(CHOICES[name])}"
        elif known and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "see TransformerConfig in megatron-core's documentation"
            yield f"unknown key {setting}: megatron-core's TransformerConfig has no such field; {hint}"
