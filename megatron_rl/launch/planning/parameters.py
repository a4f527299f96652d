"""How many parameters a rank holds: counted from the family's table of names, which also builds and loads them."""

import math
from dataclasses import dataclass

from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.stages import Stage
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping, VocabularyRows


@dataclass(frozen=True)
class Parameters:
    """Trained parameters of a rank.

    Attributes:
        dense: in the gradient buffer that all data-parallel ranks share.
        expert: in the one that only the copies of an expert share.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


def parameters_of(family: Family, layout: Layout, stage: Stage) -> Parameters:
    """Return the parameters of each rank of a pipeline stage: the ranks of one stage hold equally many."""
    counts = {False: 0, True: 0}
    for name in family.names:
        if _is_trained(name):
            # megatron-core has a buffer of their own for experts only where ranks hold different ones
            apart = name.is_expert and layout.expert > 1
            counts[apart] += shard_elements(name, layout) * _copies(name, family, layout, stage)
    return Parameters(counts[False], counts[True])


def total_parameters(family: Family) -> int:
    """Return the trained parameters of the whole model."""
    return sum(_elements(name) * _layers(name) * (name.experts or 1) for name in family.names if _is_trained(name))


def active_parameters(family: Family) -> int:
    """Return the parameters that work on one token: of the experts only those that it is sent to."""
    chosen = int(str(family.fields.get("moe_router_topk") or 0))
    return sum(
        _elements(name) * _layers(name) * (chosen if name.is_expert else 1)
        for name in family.names
        if _is_trained(name)
    )


def shard_elements(name: ParamMapping, layout: Layout) -> int:
    """Return the elements of one tensor-parallel shard of an entry, padding included."""
    size = layout.expert_tensor if name.is_expert else layout.tensor
    if isinstance(name.layout, VocabularyRows):
        return -(-name.layout.rows // size) * math.prod(name.shapes[0][1:])
    return _elements(name) if name.layout.dim is None else _elements(name) // size


def largest_stack(family: Family) -> int:
    """Return the elements of the largest tensor that holds all experts of a layer; 0 where each has its own."""
    return max((_elements(name) * name.experts for name in family.names if name.hf[0] in family.stacks), default=0)


def _copies(name: ParamMapping, family: Family, layout: Layout, stage: Stage) -> int:
    """Return how many tensors of this entry a rank of the stage has."""
    if "{layer}" in name.megatron:
        held = len(set(name.layers) & set(stage.layers))
        return held * (name.experts // layout.expert if name.is_expert else 1)
    if name.megatron.startswith("embedding."):
        return int(stage.is_first or (stage.is_last and family.tied))
    return int(stage.is_last)


def _layers(name: ParamMapping) -> int:
    return len(name.layers) if "{layer}" in name.megatron else 1


def _elements(name: ParamMapping) -> int:
    return sum(math.prod(shape) for shape in name.shapes)


def _is_trained(name: ParamMapping) -> bool:
    return not name.megatron.endswith("expert_bias")
