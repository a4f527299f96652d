"""Parameter counts, computed from the mapping between Hugging Face and Megatron names that also loads the model."""

import math
from dataclasses import dataclass

from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.stages import PipelineStage
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping, ShardVocabulary


@dataclass(frozen=True)
class ParameterCounts:
    """Trained parameters per rank.

    Attributes:
        dense: parameters in the gradient buffer of all data-parallel ranks.
        expert: parameters in the gradient buffer of the expert-data-parallel ranks.
        not_matrices: those of embedding, output head, norms and biases, which Muon leaves to Adam.
    """

    dense: int
    expert: int
    not_matrices: int

    @property
    def total(self) -> int:
        """Dense and expert parameters."""
        return self.dense + self.expert


def parameter_counts(family: Family, layout: ParallelLayout, stage: PipelineStage) -> ParameterCounts:
    """Return the parameters per rank of a pipeline stage; all ranks of a stage hold the same number."""
    dense = expert = not_matrices = 0
    for mapping in filter(_is_trained, family.mappings):
        count = shard_elements(mapping, layout) * _copies(mapping, family, layout, stage)
        if mapping.is_expert and layout.expert > 1:  # megatron-core has a separate buffer only with expert parallelism
            expert += count
        else:
            dense += count
        if len(mapping.shapes[0]) != 2 or mapping.megatron.startswith(("embedding.", "output_layer.")):
            not_matrices += count
    return ParameterCounts(dense, expert, not_matrices)


def total_parameters(family: Family) -> int:
    """Return the trained parameters of the whole model."""
    trained = filter(_is_trained, family.mappings)
    return sum(_elements(mapping) * _layers(mapping) * (mapping.experts or 1) for mapping in trained)


def active_parameters(family: Family) -> int:
    """Return the parameters that one token uses: of the experts, only those that it is routed to."""
    chosen = int(str(family.fields.get("moe_router_topk") or 0))
    trained = filter(_is_trained, family.mappings)
    return sum(_elements(mapping) * _layers(mapping) * (chosen if mapping.is_expert else 1) for mapping in trained)


def shard_elements(mapping: ParamMapping, layout: ParallelLayout) -> int:
    """Return the elements of one tensor-parallel shard of a parameter, padding included."""
    size = layout.expert_tensor if mapping.is_expert else layout.tensor
    if isinstance(mapping.rule, ShardVocabulary):
        return -(-mapping.rule.rows // size) * math.prod(mapping.shapes[0][1:])
    return _elements(mapping) if mapping.rule.dim is None else _elements(mapping) // size


def largest_stack(family: Family) -> int:
    """Return the elements of the largest tensor that holds all experts of a layer, 0 if experts are separate."""
    stacks = [mapping for mapping in family.mappings if mapping.hf[0] in family.stacked_names]
    return max((_elements(mapping) * mapping.experts for mapping in stacks), default=0)


def _copies(mapping: ParamMapping, family: Family, layout: ParallelLayout, stage: PipelineStage) -> int:
    """Return how many tensors of this mapping a rank of the stage has."""
    if "{layer}" in mapping.megatron:
        layers = len(set(mapping.layers) & set(stage.layers))
        return layers * (mapping.experts // layout.expert if mapping.is_expert else 1)
    if mapping.megatron.startswith("embedding."):
        return int(stage.is_first or (stage.is_last and family.tied))
    return int(stage.is_last)


def _layers(mapping: ParamMapping) -> int:
    return len(mapping.layers) if "{layer}" in mapping.megatron else 1


def _elements(mapping: ParamMapping) -> int:
    return sum(math.prod(shape) for shape in mapping.shapes)


def _is_trained(mapping: ParamMapping) -> bool:
    return not mapping.megatron.endswith("expert_bias")
