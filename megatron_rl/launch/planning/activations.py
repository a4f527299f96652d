"""Peak activation memory per rank: tensors saved for the backward pass, plus the working memory of one operation.

A pipeline stage holds several micro-batches at once: as many as are between it and the last stage. The counts follow
megatron-core's 1F1B schedules, with and without virtual stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.schema import Model
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.microbatch import MicrobatchWork, rank_tokens
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.launch.planning.saved_activations import FLOAT32, Modules, layer_bytes, norm_bytes
from megatron_rl.launch.planning.stages import PipelineStage
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.ops.head import SHIFT_COLUMNS, TILE_COLUMNS
from megatron_rl.ops.vocab import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Recompute:
    """What the backward pass recomputes.

    Attributes:
        layers: whole layers.
        modules: else modules of a layer, under megatron-core's names.
    """

    layers: bool
    modules: Modules

    @classmethod
    def of(cls, model: Model) -> "Recompute":
        """Return the value of ``model.recompute`` and of ``recompute_modules`` in ``model.megatron``."""
        modules = model.megatron.get("recompute_modules", ["core_attn"])
        selected = modules if model.recompute == "selective" and isinstance(modules, list) else []
        return cls(model.recompute == "full", frozenset(map(str, selected)))


@dataclass(frozen=True)
class ActivationMemory:
    """Activation bytes per rank.

    Attributes:
        saved: saved by layers for the backward passes of all micro-batches in flight.
        in_flight: number of (micro-batch, model chunk) pairs held at once.
        working: working memory of one layer or of the vocabulary operation, whichever needs more.
        tiles: number of vocabulary tiles on the last stage, 0 elsewhere.
    """

    saved: int
    in_flight: int
    working: int
    tiles: int

    @property
    def total(self) -> int:
        """Saved and working bytes."""
        return self.saved + self.working


def activation_memory(
    family: Family,
    sizes: ModelSizes,
    layout: ParallelLayout,
    stage: PipelineStage,
    work: MicrobatchWork,
    recompute: Recompute,
    microbatches: int,
) -> ActivationMemory:
    """Return the activation memory of a stage's ranks; each runs ``microbatches`` per optimizer step."""
    sparse = {layer: bool(family.num_experts) and layer not in family.dense_layers for layer in stage.layers}
    flights = in_flight(layout, stage, microbatches)
    per_chunk = [sum(_saved(sizes, layout, work, recompute, sparse[n]) for n in chunk) for chunk in stage.chunks]
    saved = _saved_in_flight(per_chunk, flights, layout.pipeline)
    saved += flights * _pipeline_buffers(sizes, layout, stage, work)
    kinds = sorted(set(sparse.values()))
    working = max(layer_working(sizes, layout, work, sparse=kind) for kind in kinds)
    working += max(_recomputed(sizes, layout, work, recompute, kind) for kind in kinds)
    tiles = 0
    if stage.is_last:  # the head's tensors are freed before the backward pass of the layers begins
        working = max(working, head_saved(sizes, layout, work) + head_working(sizes, layout, work))
        tiles = -(-shard_rows(sizes, layout) // tile_columns(work))
    return ActivationMemory(int(saved), flights, int(working), tiles)


def in_flight(layout: ParallelLayout, stage: PipelineStage, microbatches: int) -> int:
    """Return how many (micro-batch, model chunk) pairs a stage holds at once."""
    stages_after, chunks = layout.pipeline - stage.index - 1, layout.virtual_pipeline
    warm_up = 2 * stages_after + (chunks - 1) * layout.pipeline if chunks > 1 else stages_after
    return max(min(warm_up + 1, microbatches * chunks), 1)


def _saved_in_flight(per_chunk: Sequence[float], flights: int, pipeline: int) -> float:
    """Return the bytes of the first ``flights`` pairs: each chunk runs ``pipeline`` micro-batches, then the next."""
    return sum(per_chunk[number // pipeline % len(per_chunk)] for number in range(flights))


def _pipeline_buffers(sizes: ModelSizes, layout: ParallelLayout, stage: PipelineStage, work: MicrobatchWork) -> float:
    """Return the bytes of a chunk's input from another rank and its output to another rank, per pair in flight."""
    if layout.pipeline == 1:
        return 0.0
    ends = 0 if len(stage.chunks) > 1 else stage.is_first + stage.is_last
    return (2 - ends) * rank_tokens(work, sizes, layout).residual * sizes.hidden * work.dtype_bytes


def _saved(
    sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, recompute: Recompute, sparse: bool
) -> float:
    """Return the bytes that one layer saves per micro-batch."""
    if recompute.layers:
        return rank_tokens(work, sizes, layout).residual * sizes.hidden * work.dtype_bytes
    return layer_bytes(sizes, layout, work, sparse=sparse, recomputed=recompute.modules)


def _recomputed(
    sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, recompute: Recompute, sparse: bool
) -> float:
    """Return the bytes that the backward pass of one layer saves again."""
    everything = layer_bytes(sizes, layout, work, sparse=sparse)
    if recompute.layers:
        return everything
    return everything - layer_bytes(sizes, layout, work, sparse=sparse, recomputed=recompute.modules)


def layer_working(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork, *, sparse: bool) -> float:
    """Return the bytes of the gradients inside one layer's backward pass."""
    tokens, hidden = rank_tokens(work, sizes, layout), sizes.hidden
    elements = tokens.residual * hidden + tokens.attention * hidden * layout.sequence
    if sparse:
        return work.dtype_bytes * elements + exchanged_bytes(sizes, layout, work)
    return work.dtype_bytes * (elements + 2 * tokens.attention * sizes.ffn / layout.tensor)


def exchanged_bytes(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork) -> float:
    """Return the bytes of the all-to-all buffers of dispatched tokens and of their gradients."""
    tokens = rank_tokens(work, sizes, layout)
    copies = 2 * tokens.expert + tokens.residual * sizes.experts_per_token
    return copies * sizes.hidden * work.dtype_bytes


def head_saved(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork) -> float:
    """Return the bytes that the final norm and the vocabulary operation save; logits are never saved."""
    tokens = rank_tokens(work, sizes, layout)
    trained = work.trained // layout.context
    per_token = sizes.hidden * work.dtype_bytes + 6 * FLOAT32
    return norm_bytes(sizes.hidden, tokens.residual, work) + trained * per_token


def head_working(sizes: ModelSizes, layout: ParallelLayout, work: MicrobatchWork) -> float:
    """Return the working bytes of the vocabulary operation: the maximum of its forward and backward pass."""
    trained, size = work.trained // layout.context, work.dtype_bytes
    rows, hidden = shard_rows(sizes, layout), sizes.hidden
    columns = min(tile_columns(work), rows)
    passes = 0 if work.fused else 3 * FLOAT32 * min(trained * columns, CHUNK_ELEMENTS)
    gathered = work.tokens // layout.context * hidden * size * layout.sequence
    forward = trained * columns * FLOAT32 + passes + gathered
    shifted = (trained + columns) * (hidden + SHIFT_COLUMNS) * size if size < FLOAT32 else 0
    gradients = trained * hidden * FLOAT32 + rows * hidden * size
    return max(forward, trained * columns * size + passes + shifted + gradients)


def shard_rows(sizes: ModelSizes, layout: ParallelLayout) -> int:
    """Return the vocabulary rows per rank of the last stage."""
    return -(-sizes.vocabulary // layout.tensor)


def tile_columns(work: MicrobatchWork) -> int:
    """Return the vocabulary entries per tile of logits."""
    return TILE_COLUMNS["cuda" if work.fused else "cpu"]
