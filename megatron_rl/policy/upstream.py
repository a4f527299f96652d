"""Repairs of megatron-core itself, on any device. Each names the fault and the version that no longer has it."""

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def repair() -> None:
    """Apply the repairs; harmless where they are not needed.

    ``moe_utils.te_general_gemm``: 0.16 reads the name in the router's product without having defined it where
    transformer-engine is absent (NameError); 0.19 defines it.

    ``multi_latent_attention.HAVE_TE``: 0.16 takes transformer-engine for present whenever its own wrappers can be
    imported, and then asks whether a layer is of a type that is a mock (TypeError).
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
