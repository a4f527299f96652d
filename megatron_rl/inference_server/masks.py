"""Attention masks in the forms that transformers' models expect.

Legend: B sequences.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

SLIDING, FULL = "sliding_attention", "full_attention"


def has_sliding_layers(model: PreTrainedModel) -> bool:
    """Return whether some layers have sliding-window attention, and the model expects one mask per layer type."""
    return SLIDING in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def attention_masks(model: PreTrainedModel, visible: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the ``attention_mask`` of the model: one mask, or one per layer type.

    Args:
        model: the model.
        visible: bool [B, 1, queries, keys], True where a query sees a key, without regard to windows; the queries are
            the last positions.
    """
    if not has_sliding_layers(model):
        return _converted(model, visible)
    positions = torch.arange(visible.shape[-1], device=visible.device)
    queries = positions[-visible.shape[-2] :]
    in_window = positions > queries[:, None] - model.config.get_text_config().sliding_window
    return {FULL: _converted(model, visible), SLIDING: _converted(model, visible & in_window)}


def _converted(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """Return an additive mask for eager attention, else the boolean mask."""
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(model.dtype).min
    )
