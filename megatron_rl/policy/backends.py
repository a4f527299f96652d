"""Selects the implementation of each part of a layer by installed packages, device type and dtype.

Read from the sources of megatron-core 0.16.1, transformer-engine and torch 2.13; of these only what serves a CPU was
run so far.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from megatron_rl.errors import ConfigError

PLAIN_VARIABLE = "MEGATRON_RL_PLAIN"
"""Environment variable that disables fast paths for comparison: a comma-separated list of ``PARTS``."""

PARTS = ("engine", "attention", "experts", "fusion")


@dataclass(frozen=True)
class Backends:
    """The selected implementations.

    Attributes:
        engine: whether layers are transformer-engine's; else megatron-core's local ones with ours.
        varlen: whether attention is torch's kernel for packed rows; else its scaled dot product on buckets of rows.
        grouped: whether experts are grouped products; else megatron-core's loop.
        fused: whether activations and residual sums are compiled into one kernel each.
        accumulates: whether weight gradients are added to the main gradients by the product itself (apex).
    """

    engine: bool
    varlen: bool
    grouped: bool
    fused: bool
    accumulates: bool


def backends_for(dtype: torch.dtype, device_type: str) -> Backends:
    """Return the implementations for this dtype and device type.

    Raises:
        ConfigError: the environment variable names an unknown part.
    """
    plain = plain_parts()
    half = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    engine = half and "engine" not in plain and _found("transformer_engine")
    return Backends(
        engine=engine,
        varlen=half and not engine and "attention" not in plain and _found("torch.nn.attention.varlen"),
        grouped=not engine and "experts" not in plain and hasattr(torch.nn.functional, "grouped_mm"),
        fused=device_type == "cuda" and "fusion" not in plain and _found("triton"),
        accumulates=engine and _found("fused_weight_gradient_mlp_cuda"),
    )


def plain_parts() -> set[str]:
    """Return the parts that the environment variable names.

    Raises:
        ConfigError: it names an unknown part.
    """
    plain = {part.strip() for part in os.environ.get(PLAIN_VARIABLE, "").split(",") if part.strip()}
    if unknown := sorted(plain - {*PARTS}):
        raise ConfigError(f"{PLAIN_VARIABLE} names {', '.join(unknown)}; write some of {', '.join(PARTS)}")
    return plain


def describe_backends(paths: Backends, device_type: str) -> Mapping[str, str]:
    """Return, for people, what serves each part: the rows that ``check`` prints."""
    engine = "transformer-engine"
    compiled, norm = "one kernel by torch.compile", "torch's RMSNorm"
    buckets = "torch's scaled dot product, sequences of similar length together"
    return {
        "layers": engine if paths.engine else "megatron-core's local spec",
        "attention": engine if paths.engine else "torch's variable-length kernel" if paths.varlen else buckets,
        "experts": f"{engine}, grouped" if paths.engine else "torch's grouped product" if paths.grouped else "a loop",
        "norm": engine if paths.engine else f"{norm} (one kernel)" if device_type == "cuda" else norm,
        "activation": compiled if paths.fused else "torch, eager",
        "weight gradients": "apex, added by the product" if paths.accumulates else "added after the product",
        "optimizer": _optimizer(),
    }


def fusions(paths: Backends, fields: Mapping[str, object]) -> dict[str, object]:
    """Return megatron-core's switches of fused kernels, which are all off by default.

    Args:
        paths: the selected implementations.
        fields: TransformerConfig fields of the model's family, which may rule out a fusion.
    """
    plain_rope = not fields.get("multi_latent_attention") and "yarn_rotary_scaling_factor" not in fields
    biased = bool(fields.get("add_bias_linear"))
    return {
        "bias_activation_fusion": paths.fused and not biased,
        "bias_dropout_fusion": paths.fused and not biased,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": paths.engine and plain_rope,
        "moe_grouped_gemm": paths.engine,
        "moe_permute_fusion": paths.engine,
        "gradient_accumulation_fusion": paths.accumulates,
    }


def _optimizer() -> str:
    """Return the implementation of Adam that megatron-core selects, which depends on the installed packages."""
    if _found("transformer_engine"):
        return "transformer-engine's fused Adam"
    return "apex's fused Adam" if _found("apex") else "torch's Adam"


@cache
def _found(module: str) -> bool:
    parent, _, _ = module.partition(".")
    return find_spec(parent) is not None and find_spec(module) is not None
