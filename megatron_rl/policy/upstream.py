"""Workarounds for defects of megatron-core on any device, each with its reason and the affected versions.

Workarounds that need the context of a layer are next to it: ``layers.ReplicatedLinear`` (latent attention's down
projections), ``balance`` (scale of the load-balancing loss), ``model._built`` (biased experts shared by several ranks),
``PolicyModel._preprocess`` (padding mask on later stages) and ``build_chunks`` (``no_sync`` with overlapped reduction).
Replacements for machines without a GPU are in ``distributed.cpu``.
"""

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def repair() -> None:
    """Apply all workarounds. Versions that do not need one are left unchanged.

    ``moe_utils.te_general_gemm``: 0.16 reads the name in the router's product without having defined it where
    transformer-engine is absent (NameError); 0.19 defines it.

    ``multi_latent_attention.HAVE_TE``: 0.16 takes transformer-engine for present whenever its own wrappers can be
    imported, and then asks whether a layer is of a type that is a mock (TypeError).

    ``MLASelfAttention._resolve_qk_norm_config``: 0.19 refuses a norm of the key latents where queries have no latents
    (q_lora_rank = None, DeepSeek-V2-Lite), or adds a norm of the queries with transformer-engine. The spec is used as
    it was written.
    """
    multi_latent_attention.MLASelfAttention._resolve_qk_norm_config = _as_specified
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def mark_expert_parameters(model: nn.Module, config: TransformerConfig) -> None:
    """Set on each expert parameter whether the dense data-parallel group may reduce its gradient.

    megatron-core reads the attribute ``allreduce`` when it wraps the model. 0.16 sets it from the expert-parallel size
    alone, and with ``expert = 1`` and ``expert_tensor != tensor`` then sums expert gradients over the wrong ranks; 0.19
    sets it right in its own layers. The dense group is right only where experts are cut as dense matrices are.
    """
    cut_as_dense = config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            setattr(parameter, "allreduce", config.expert_model_parallel_size == 1 and cut_as_dense)  # noqa: B010


def _as_specified(_: object, submodules: object) -> dict[str, object]:
    parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
    return {part: getattr(submodules, part) for part in parts}
