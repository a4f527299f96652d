"""Asks transformer-engine which attention kernel it selects for a model's shapes on this machine's GPU."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from megatron_rl.distributed.mesh import on_cuda


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one rank, as ``train.tokens_per_microbatch`` packs its rows.

    Attributes:
        heads: query heads of the rank.
        kv_heads: key-value heads of the rank.
        query_dim: dimensions per query and key head.
        value_dim: dimensions per value head.
        window: tokens that a query sees, itself included; 0: all before it.
        sinks: whether the softmax has learned sinks.
        sequences: sequences per row.
        longest: tokens of the longest sequence.
        tokens: tokens of a row, over all context-parallel ranks.
        context: context-parallel ranks.
        deterministic: whether only deterministic algorithms are allowed.
    """

    heads: int
    kv_heads: int
    query_dim: int
    value_dim: int
    window: int
    sinks: bool
    sequences: int
    longest: int
    tokens: int
    context: int
    deterministic: bool

    @property
    def exchange(self) -> str:
        """How context-parallel ranks exchange keys and values: ``transformer_config`` sets the same."""
        return "a2a" if self.window or self.sinks else "p2p"

    @property
    def unfused_bytes(self) -> int:
        """Bytes per layer of the shares of all pairs of tokens, which unfused attention saves twice in 16 bits."""
        return 4 * self.sequences * self.heads * self.longest**2


def why_not_asked() -> str | None:
    """Return why transformer-engine cannot be asked on this machine; None if it can."""
    if find_spec("transformer_engine") is None:
        return "transformer-engine is not installed here"
    return None if on_cuda() else "this machine has no GPU"


def selected_kernel(shape: AttentionShape) -> str | None:
    """Return "flash", "fused" (cuDNN) or "unfused"; None: transformer-engine supports none of them.

    The selection is transformer-engine's own, with the installed cuDNN and flash-attn and the NVTE_* variables.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    parameters = utils.AttentionParams(
        qkv_dtype=torch.bfloat16,
        qkv_layout="thd_thd_thd",
        batch_size=shape.sequences,
        num_heads=shape.heads,
        num_gqa_groups=shape.kv_heads,
        max_seqlen_q=shape.longest,
        max_seqlen_kv=shape.longest,
        num_tokens_q=shape.tokens // shape.context,
        num_tokens_kv=shape.tokens // shape.context,
        head_dim_qk=shape.query_dim,
        head_dim_v=shape.value_dim,
        attn_mask_type="padding_causal",
        window_size=(shape.window - 1 if shape.window else -1, 0),
        core_attention_bias_requires_grad=False,
        context_parallel=shape.context > 1,
        cp_comm_type=shape.exchange,
        cp_size=shape.context,
        deterministic=shape.deterministic,
        softmax_type="learnable" if shape.sinks else "vanilla",
    )
    flash, _, fused, _, unfused, _ = utils.get_attention_backend(parameters)
    return "flash" if flash else "fused" if fused else "unfused" if unfused else None
