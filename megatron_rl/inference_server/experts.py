"""Experts of a decoding step for types that the grouped product of a GPU does not take: every token through every one.

torch's grouped product has a kernel for bfloat16; of other types it reads the groups' sizes on the host, which a CUDA
graph cannot. A decoding step reads all experts' weights anyway, so that a batched product over all of them costs little
more while tokens are few.

Legend: T tokens, E experts, K experts that a token takes, H hidden size, I width of an expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "every_expert"


def every_expert(experts: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return what transformers' implementations return, [T, H]."""
    tokens, count = len(hidden_TH), experts.num_experts
    shares_TE = torch.zeros(tokens, count, dtype=hidden_TH.dtype, device=hidden_TH.device)
    shares_TE.scatter_(1, index_TK, weights_TK.to(hidden_TH.dtype))
    both_ETI = _product(experts, "gate_up_proj", hidden_TH.expand(count, -1, -1))
    outputs_ETH = _product(experts, "down_proj", experts._apply_gate(both_ETI))
    return torch.einsum("te,eth->th", shares_TE, outputs_ETH)


def _product(experts: Any, name: str, inputs_ETI: Tensor) -> Tensor:
    """Return every expert's product with its matrix of this name, and its bias on top if it has one."""
    matrices = getattr(experts, name)
    products = torch.bmm(inputs_ETI, matrices if experts.is_transposed else matrices.transpose(1, 2))
    return products + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else products


ALL_EXPERTS_FUNCTIONS.register(NAME, every_expert)


def takes_every_expert(model: PreTrainedModel) -> bool:
    """Return whether the model has experts, in a form that this knows: gated, and nothing after them."""
    found: list[Any] = [
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate")
    ]
    return bool(found) and all(module.has_gate and not module.has_post_expert_norm for module in found)


@contextmanager
def experts_by(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Let experts be computed this way meanwhile; None: as they are."""
    config = model.config.get_text_config()
    before = config._experts_implementation
    config._experts_implementation = name or before
    try:
        yield
    finally:
        config._experts_implementation = before
