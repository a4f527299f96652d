"""The micro-batch that memory and operation counts assume, and the part of it that one rank holds."""

from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.model_sizes import ModelSizes

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class MicrobatchWork:
    """One micro-batch: a packed row of sequences.

    Attributes:
        tokens: tokens of the row, over all context-parallel ranks.
        longest: tokens of its longest sequence.
        trained: tokens whose log-probs are computed.
        dtype_bytes: bytes per weight.
        expert_imbalance: tokens of the busiest rank's experts, as a multiple of the average.
        fused: layers are transformer-engine's (GPU); otherwise megatron-core's local layers (CPU).
    """

    tokens: int
    longest: int
    trained: int
    dtype_bytes: int
    expert_imbalance: float
    fused: bool


@dataclass(frozen=True)
class RankTokens:
    """Tokens of a micro-batch that one rank holds.

    Attributes:
        attention: tokens inside attention and dense networks.
        residual: tokens between layers; fewer than ``attention`` with sequence parallelism.
        expert: token copies that arrive at the rank's experts, one per token and chosen expert.
    """

    attention: int
    residual: int
    expert: float


def full_microbatch(run: Run, longest: int, *, fused: bool) -> MicrobatchWork:
    """Return a full row: as many sequences of ``longest`` tokens as fit, with every token trained."""
    tokens = run.train.tokens_per_microbatch if run.train.packing else longest
    tokens = -(-tokens // run.parallel.row_multiple) * run.parallel.row_multiple
    dtype_bytes = DTYPE_BYTES[run.model.dtype]
    return MicrobatchWork(tokens, min(longest, tokens), tokens, dtype_bytes, run.cluster.expert_imbalance, fused)


def rank_tokens(work: MicrobatchWork, sizes: ModelSizes, layout: ParallelLayout) -> RankTokens:
    """Return the tokens of a micro-batch that a rank holds; its experts are those of the busiest rank."""
    attention = work.tokens // layout.context
    residual = attention // layout.tensor if layout.sequence else attention
    imbalance = work.expert_imbalance if layout.expert > 1 else 1.0
    return RankTokens(attention, residual, residual * sizes.experts_per_token * layout.expert_tensor * imbalance)


def gathered_tokens(tokens: RankTokens, layout: ParallelLayout, work: MicrobatchWork) -> int:
    """Return the tokens whose keys a rank stores: local layers gather the row over context-parallel ranks."""
    return tokens.attention if work.fused else tokens.attention * layout.context
