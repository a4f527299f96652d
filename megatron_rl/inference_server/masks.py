"""Which positions attend to which, in the forms that transformers' models take.

Legend: B rows, Q queries, K cached and new positions.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

WINDOWED, FULL = "sliding_attention", "full_attention"


def has_windowed_layers(model: PreTrainedModel) -> bool:
    """Return whether some layers see a window only, and the model takes a mask for each kind of layer."""
    return WINDOWED in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def masks(model: PreTrainedModel, seen_B1QK: Tensor, places_BQ: Tensor | None = None) -> Tensor | dict[str, Tensor]:
    """Return the mask, or one for each kind of layer, as the model's attention wants it.

    Args:
        model: whose ``attention_mask`` it will be.
        seen_B1QK: True where a query sees a key, windows not considered.
        places_BQ: which of the K positions each query is; None: the last ones.
    """
    if not has_windowed_layers(model):
        return _as_wanted(model, seen_B1QK)
    place_K = torch.arange(seen_B1QK.shape[-1], device=seen_B1QK.device)
    places_BQ = place_K[None, -seen_B1QK.shape[-2] :] if places_BQ is None else places_BQ
    near_B1QK = (place_K > places_BQ[:, :, None] - model.config.get_text_config().sliding_window)[:, None]
    return {FULL: _as_wanted(model, seen_B1QK), WINDOWED: _as_wanted(model, seen_B1QK & near_B1QK)}


def _as_wanted(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """Return a mask to add to the scores where transformers writes attention out, else as it is."""
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(model.dtype).min
    )
