"""The most that activations take on a rank: what is kept for the backward pass, and what works on top of it.

In a pipeline a stage keeps several micro-batches at once: as many as are on their way from it to the last stage and
back (the schedules of megatron-core, with and without virtual stages).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.saved import WIDE, layer_bytes, norm_bytes, share_of
from megatron_rl.launch.planning.stages import Stage
from megatron_rl.launch.planning.widths import Widths, Work
from megatron_rl.models.hf_mapping.rules import Family
from megatron_rl.ops.head import SHIFT_COLUMNS, TILE_COLUMNS
from megatron_rl.ops.vocab import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank.

    Attributes:
        kept: by layers, for the backward passes of all micro-batches in flight.
        in_flight: how many model chunks hold a micro-batch at the same time.
        working: on top of that while one layer, or the vocabulary operation, is at work.
        tiles: of the vocabulary operation, part of ``working`` on the last stage; its number of tiles.
    """

    kept: int
    in_flight: int
    working: int
    tiles: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.working


def activations_of(
    family: Family, widths: Widths, layout: Layout, stage: Stage, work: Work, recompute: str, rows: int
) -> Activations:
    """Return the activations of the ranks of a stage; ``rows`` micro-batches make an optimizer step."""
    mixed = bool(family.num_experts)
    sparse = {layer: mixed and layer not in family.dense_layers for layer in stage.layers}
    flights = in_flight(layout, stage, rows)
    per_chunk = [sum(_kept(widths, layout, work, recompute, sparse[n]) for n in chunk) for chunk in stage.chunks]
    kept = _sum_of_flights(per_chunk, flights, layout.pipeline) + flights * _handed_on(widths, layout, stage, work)
    kinds = sorted(set(sparse.values()))
    working = max(layer_working(widths, layout, work, sparse=kind) for kind in kinds)
    if recompute == "full":
        working += max(layer_bytes(widths, layout, work, sparse=kind) for kind in kinds)
    tiles = 0
    if stage.is_last:  # what the head keeps is let go before the layers' backward pass begins
        working = max(working, head_kept(widths, layout, work) + head_working(widths, layout, work))
        tiles = -(-shard_rows(widths, layout) // tile_columns(work))
    return Activations(int(kept), flights, int(working), tiles)


def in_flight(layout: Layout, stage: Stage, rows: int) -> int:
    """Return how many (micro-batch, model chunk) pairs a stage keeps at once."""
    ahead, chunks = layout.pipeline - stage.index - 1, layout.virtual_pipeline
    warm_up = 2 * ahead + (chunks - 1) * layout.pipeline if chunks > 1 else ahead
    return max(min(warm_up + 1, rows * chunks), 1)


def _sum_of_flights(per_chunk: Sequence[float], flights: int, pipeline: int) -> float:
    """Return what the first so many pairs keep: ``pipeline`` micro-batches go through one chunk, then the next."""
    return sum(per_chunk[number // pipeline % len(per_chunk)] for number in range(flights))


def _handed_on(widths: Widths, layout: Layout, stage: Stage, work: Work) -> float:
    """Return what the schedule holds of a pair: the chunk's input from another rank, and its output to one."""
    if layout.pipeline == 1:
        return 0.0
    ends = 0 if len(stage.chunks) > 1 else stage.is_first + stage.is_last
    return (2 - ends) * share_of(work, widths, layout).S * widths.hidden * work.bytes


def _kept(widths: Widths, layout: Layout, work: Work, recompute: str, sparse: bool) -> float:
    """Return what one layer keeps of one micro-batch."""
    if recompute == "full":
        return share_of(work, widths, layout).S * widths.hidden * work.bytes
    return layer_bytes(widths, layout, work, sparse=sparse, keeps_attention=recompute == "none")


def layer_working(widths: Widths, layout: Layout, work: Work, *, sparse: bool) -> float:
    """Return what the backward pass of a layer holds besides what was kept: gradients on their way through it."""
    share, size, hidden = share_of(work, widths, layout), work.bytes, widths.hidden
    residual = share.S * hidden + share.T * hidden * layout.sequence
    dense = 2 * share.T * widths.ffn / layout.tensor
    return size * (residual + (0 if sparse else dense)) + (exchanged_bytes(widths, layout, work) if sparse else 0)


def exchanged_bytes(widths: Widths, layout: Layout, work: Work) -> float:
    """Return the buffers of tokens on their way to experts and back, and of their gradients."""
    share = share_of(work, widths, layout)
    return (2 * share.R + share.S * widths.per_token) * widths.hidden * work.bytes


def head_kept(widths: Widths, layout: Layout, work: Work) -> float:
    """Return what the last norm and the vocabulary operation keep: never logits."""
    share = share_of(work, widths, layout)
    trained = work.trained // layout.context
    return norm_bytes(widths.hidden, share.S, work) + trained * (widths.hidden * work.bytes + 6 * WIDE)


def head_working(widths: Widths, layout: Layout, work: Work) -> float:
    """Return what the vocabulary operation takes while it works, forward or backward, whichever is more."""
    trained, size, narrow = work.trained // layout.context, work.bytes, work.bytes < WIDE
    rows, hidden = shard_rows(widths, layout), widths.hidden
    columns = min(tile_columns(work), rows)
    passes = 0 if work.fused else 3 * WIDE * min(trained * columns, CHUNK_ELEMENTS)
    forward = trained * columns * WIDE + passes + work.row // layout.context * hidden * size * layout.sequence
    shifted = (trained + columns) * (hidden + SHIFT_COLUMNS) * size if narrow else 0
    gradients = trained * hidden * WIDE + rows * hidden * size
    return max(forward, trained * columns * size + passes + shifted + gradients)


def shard_rows(widths: Widths, layout: Layout) -> int:
    """Return the rows of the vocabulary that a rank of the last stage holds."""
    return -(-widths.vocabulary // layout.tensor)


def tile_columns(work: Work) -> int:
    """Return the columns of a tile of logits."""
    return TILE_COLUMNS["cuda" if work.fused else "cpu"]
