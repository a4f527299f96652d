"""Layers per pipeline stage, in megatron-core's assignment."""

from dataclasses import dataclass

from megatron_rl.launch.planning.layout import ParallelLayout


@dataclass(frozen=True)
class PipelineStage:
    """One pipeline rank.

    Attributes:
        index: 0 is the first stage.
        chunks: layers of each model chunk, in the order of the schedule; one chunk without virtual stages.
        is_first: the stage holds the embedding.
        is_last: the stage holds the final norm and the output head.
    """

    index: int
    chunks: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers of the stage."""
        return tuple(layer for chunk in self.chunks for layer in chunk)


def pipeline_stages(num_layers: int, layout: ParallelLayout) -> tuple[PipelineStage, ...]:
    """Return the pipeline stages of a model with ``num_layers`` layers."""
    last = layout.pipeline - 1
    chunks = [_chunks(num_layers, layout, stage) for stage in range(layout.pipeline)]
    return tuple(PipelineStage(n, chunks[n], n == 0, n == last) for n in range(layout.pipeline))


def _chunks(num_layers: int, layout: ParallelLayout, stage: int) -> tuple[tuple[int, ...], ...]:
    if layout.is_uneven:
        starts = [0]
        for count in layout.stage_sizes(num_layers):
            starts.append(starts[-1] + count)
        return (tuple(range(starts[stage], starts[stage + 1])),)
    size = num_layers // (layout.pipeline * layout.virtual_pipeline)
    firsts = [(chunk * layout.pipeline + stage) * size for chunk in range(layout.virtual_pipeline)]
    return tuple(tuple(range(first, first + size)) for first in firsts)
