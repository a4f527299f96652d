"""Workarounds for defects of megatron-core on any device, and the one place that depends on its release.

``tests/policy/test_workarounds.py`` measures megatron-core without each workaround, and fails when a release has fixed
a defect. The table of results is in docs/compatibility.md. Workarounds that are a part of a layer are next to it:
``layers.Norm``, ``layers.LatentAttention``, ``experts.GroupedExperts``, ``balance`` (scale of the load-balancing loss),
``model.YarnConfig``, ``hf_weights.mark_shards``.
Replacements for machines without a GPU are in ``distributed.cpu``.

Legend: T tokens, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_rl.util.megatron_version import megatron_release

RELEASE = megatron_release()
"""Major and minor version of the installed megatron-core."""


def repair() -> None:
    """Apply the workarounds that replace functions of megatron-core, if the installed release needs them."""
    if RELEASE < (0, 17):
        define_router_gemm()
        ignore_mocked_transformer_engine()
    define_fp8_state()
    if RELEASE >= (0, 19):
        use_latent_norms_as_specified()


def define_router_gemm() -> None:
    """Define ``moe_utils.te_general_gemm``, which 0.16 reads without transformer-engine (NameError)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def ignore_mocked_transformer_engine() -> None:
    """Clear ``multi_latent_attention.HAVE_TE`` where transformer-engine is absent.

    0.16 sets it whenever its own wrappers can be imported, and then asks whether a layer is of a type that is a mock
    (TypeError).
    """
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


class DisabledFP8:
    """Stands in for transformer-engine's ``FP8GlobalStateManager`` where transformer-engine is absent."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


def define_fp8_state() -> None:
    """Define what the recomputation of norms (``recompute_modules``) reads without transformer-engine (NameError)."""
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = DisabledFP8
        random.activation_recompute_forward = _no_context
        random.fp8_autocast = _no_context


def _no_context(**_: object) -> AbstractContextManager[None]:
    return nullcontext()


def use_latent_norms_as_specified() -> None:
    """Let latent attention use the norms of its spec.

    0.19 refuses a norm of the key latents where queries have no latents (q_lora_rank = None, DeepSeek-V2-Lite), or adds
    a norm of the queries with transformer-engine.
    """
    multi_latent_attention.MLASelfAttention._resolve_qk_norm_config = _as_specified


def _as_specified(_: object, submodules: object) -> dict[str, object]:
    parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
    return {part: getattr(submodules, part) for part in parts}


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


def sort_experts(values_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and numbers of the chosen experts in the order of the scores, with and without gradients.

    0.18 and later sort only where gradients are on. Gates are normalized by a sum over the chosen experts, so without
    this sort scoring and training would add them in different orders, and first ratios would not be exactly 1.
    """
    if RELEASE < (0, 18) or torch.is_grad_enabled():
        return values_TK, experts_TK
    values_TK, order_TK = values_TK.sort(dim=1, descending=True, stable=True)
    return values_TK, experts_TK.gather(1, order_TK)


def no_sync_function(chunks: Sequence[DistributedDataParallel]) -> Callable[[], object] | list[Callable[[], object]]:
    """Return the value of ``TransformerConfig.no_sync_func`` for overlapped gradient reduction.

    Without it, megatron-core reduces after every micro-batch and counts earlier gradients twice.
    """
    no_sync = [chunk.no_sync for chunk in chunks]
    return no_sync if len(no_sync) > 1 else no_sync[0]


def split_padding_mask(mask_1T: Tensor, tensor: dist.ProcessGroup) -> Tensor:
    """Return this tensor-parallel rank's part of the mask of padding.

    megatron-core splits the mask on the first pipeline stage only; later stages need it too.
    """
    return mask_1T.chunk(tensor.size(), dim=1)[tensor.rank()]


def decoder_layers(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, dict[int, nn.Module]]]:
    """Yield each unwrapped chunk of the model with its decoder layers by global index, in the order of the chunk."""
    for chunk in unwrap_model(list(chunks)):
        yield chunk, {layer.layer_number - 1: layer for layer in chunk.decoder.layers}
