"""Who holds what of the trainer: the rules of ``hf_mapping`` as boxes instead of operations on tensors."""

from collections.abc import Iterator

from megatron_rl.errors import DataError
from megatron_rl.models.hf_mapping.rules import (
    Family,
    FuseGateUp,
    FuseQKV,
    ParamMapping,
    Replicate,
    Shard,
    ShardVocabulary,
)
from megatron_rl.models.reshard.boxes import Box, Piece, matrix_shape
from megatron_rl.models.reshard.layouts import TrainerLayout


def trainer_boxes(family: Family, layout: TrainerLayout) -> Iterator[tuple[str, list[Box]]]:
    """Yield (Hugging Face name, boxes) of every tensor; the boxes of a tensor cover it once.

    Raises:
        DataError: the family has tensors of a kind that cannot be planned.
    """
    for mapping, layer, expert in family.parameters():
        size = layout.expert_tensor if mapping.is_expert else layout.tensor
        for part, name in enumerate(mapping.hf_names(layer, expert)):
            boxes: list[Box] = []
            is_whole = mapping.rule.dim is None
            for index in range(1 if is_whole else size):
                ranks = _ranks(mapping, layer, expert, layout, None if is_whole else index)
                parameter = mapping.megatron_name(layer, expert)
                pieces = shard_pieces(mapping, part, index, size)
                boxes += [Box(rows, columns, parameter, row, column, ranks) for rows, columns, row, column in pieces]
            yield name, boxes


def _ranks(mapping: ParamMapping, layer: int, expert: int, layout: TrainerLayout, index: int | None) -> tuple[int, ...]:
    """Return the ranks that hold a shard; of a whole parameter those of all indices."""
    stage = _stage(mapping, layer, layout)
    if not mapping.is_expert:
        indices = range(layout.tensor) if index is None else (index,)
        return tuple(sorted(rank for i in indices for rank in layout.dense_ranks(stage, i)))
    group = expert // (mapping.experts // layout.expert)
    indices = range(layout.expert_tensor) if index is None else (index,)
    return tuple(sorted(rank for i in indices for rank in layout.expert_ranks(stage, group, i)))


def _stage(mapping: ParamMapping, layer: int, layout: TrainerLayout) -> int:
    if "{layer}" in mapping.megatron:
        return layout.stage_of_layer[layer]
    return 0 if mapping.megatron.startswith("embedding.") else layout.pipeline - 1


def shard_pieces(mapping: ParamMapping, part: int, index: int, size: int) -> Iterator[Piece]:
    """Yield what shard ``index`` of ``size`` has of the mapping's Hugging Face tensor number ``part``.

    Raises:
        DataError: the rule cannot be planned.
    """
    rule, (rows, columns) = mapping.rule, matrix_shape(mapping.shapes[part])
    everything = (0, columns)
    if isinstance(rule, Replicate):
        yield (0, rows), everything, 0, 0
    elif isinstance(rule, Shard) and not rule.transposed:
        length = (columns if rule.dim else rows) // size
        span = (index * length, (index + 1) * length)
        yield ((0, rows), span, 0, 0) if rule.dim else (span, everything, 0, 0)
    elif isinstance(rule, ShardVocabulary):
        length = -(-rule.rows // size)
        if index * length < rows:
            yield (index * length, min((index + 1) * length, rows)), everything, 0, 0
    elif isinstance(rule, FuseGateUp):
        length = rows // size
        yield (index * length, (index + 1) * length), everything, part * length, 0
    elif isinstance(rule, FuseQKV):
        lengths = [shape[0] // rule.groups for shape in mapping.shapes]
        first = index * (rule.groups // size)
        for group in range(rule.groups // size):
            start = (first + group) * lengths[part]
            yield (start, start + lengths[part]), everything, group * sum(lengths) + sum(lengths[:part]), 0
    else:
        raise DataError(f"{mapping.megatron}: {type(rule).__name__} cannot be planned; push whole tensors")
