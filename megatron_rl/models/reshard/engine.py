"""Who holds what of an engine: SGLang's parameters and shards, from the rules of ``hf_mapping``.

Queries, keys and values are one parameter, and so are gate and up, each with the rank's rows one after the other. A
key-value head is on several ranks if there are fewer heads than ranks. The experts of a rank are one parameter, with
the experts' rows one after the other. What cannot be sharded is on every rank.
"""

import re
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
from megatron_rl.models.reshard.boxes import Box, Piece, Span, matrix_shape
from megatron_rl.models.reshard.layouts import EngineLayout

_FUSED = ((r"\.[qkv]_proj\.", ".qkv_proj."), (r"\.(gate|up)_proj\.", ".gate_up_proj."))
_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.weight$")
_EXPERT_PARAMETERS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}


def engine_boxes(family: Family, layout: EngineLayout) -> Iterator[tuple[str, list[Box]]]:
    """Yield (Hugging Face name, boxes) of every tensor; each rank's boxes are what it needs of the tensor.

    Raises:
        DataError: the engine cannot have this layout, or a tensor is of a kind that cannot be planned.
    """
    if layout.tensor % layout.expert or (family.num_experts % layout.expert):
        raise DataError(
            f"an engine with {layout.expert} parts of experts: this must divide its {layout.tensor} ranks and the"
            f" {family.num_experts} experts per layer"
        )
    for mapping, layer, expert in family.parameters():
        for part, name in enumerate(mapping.hf_names(layer, expert)):
            parameter = parameter_name(name)
            yield (
                name,
                [
                    Box(rows, columns, parameter, row, column, (rank,))
                    for rank in _ranks(mapping, expert, layout)
                    for rows, columns, row, column in _pieces(mapping, part, expert, rank, layout)
                ],
            )


def _ranks(mapping: ParamMapping, expert: int, layout: EngineLayout) -> range:
    """Return the ranks that need a tensor, or a part of it."""
    if not mapping.is_expert:
        return range(layout.tensor)
    first = expert // (mapping.experts // layout.expert) * layout.expert_tensor
    return range(first, first + layout.expert_tensor)


def parameter_name(name: str) -> str:
    """Return the name of the engine's parameter that holds a Hugging Face tensor."""
    for pattern, fused in _FUSED:
        name = re.sub(pattern, fused, name)
    if match := _EXPERT.search(name):
        return f"{name[: match.start()]}.experts.{_EXPERT_PARAMETERS.get(match[1], match[1])}"
    return name


def _pieces(mapping: ParamMapping, part: int, expert: int, rank: int, layout: EngineLayout) -> Iterator[Piece]:
    """Yield what a rank needs of a tensor: rows and columns, and where they begin in its parameter."""
    index, size, base = rank, layout.tensor, 0
    if mapping.is_expert:
        index, size = rank % layout.expert_tensor, layout.expert_tensor
        base = expert % (mapping.experts // layout.expert)
    rule, (rows, columns) = mapping.rule, matrix_shape(mapping.shapes[part])
    everything = (0, columns)
    if isinstance(rule, Replicate):
        yield (0, rows), everything, base * rows, 0
    elif isinstance(rule, Shard) and not rule.transposed and rule.dim:
        span = _chunk(columns, index, size, mapping)
        yield (0, rows), span, base * rows, 0
    elif isinstance(rule, Shard) and not rule.transposed:
        span = _chunk(rows, index, size, mapping)
        yield span, everything, base * (span[1] - span[0]), 0
    elif isinstance(rule, ShardVocabulary):
        length = -(-rule.rows // layout.vocabulary_multiple) * layout.vocabulary_multiple // size
        if index * length < rows:
            yield (index * length, min((index + 1) * length, rows)), everything, 0, 0
    elif isinstance(rule, FuseGateUp):
        start, stop = _chunk(rows, index, size, mapping)
        yield (start, stop), everything, (2 * base + part) * (stop - start), 0
    elif isinstance(rule, FuseQKV):
        spans = [_heads(rule, shape[0], number, index, size, mapping) for number, shape in enumerate(mapping.shapes)]
        yield spans[part], everything, sum(stop - start for start, stop in spans[:part]), 0
    else:
        raise DataError(f"{mapping.megatron}: {type(rule).__name__} cannot be planned; push whole tensors")


def _heads(rule: FuseQKV, rows: int, part: int, index: int, size: int, mapping: ParamMapping) -> Span:
    """Return a rank's rows of the queries, keys or values (part 0, 1 or 2)."""
    if part == 0 or rule.groups >= size:
        return _chunk(rows, index, size, mapping)
    group, length = index * rule.groups // size, rows // rule.groups
    return group * length, (group + 1) * length


def _chunk(length: int, index: int, size: int, mapping: ParamMapping) -> Span:
    if length % size:
        raise DataError(f"{mapping.hf[0]}: {length} rows or columns cannot be divided by {size} ranks of the engine")
    return index * (length // size), (index + 1) * (length // size)
