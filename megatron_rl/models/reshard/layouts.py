"""The layouts of the trainer and of an inference engine, as far as they decide who holds which weights."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerLayout:
    """Sizes of the trainer's mesh axes, in megatron-core's order of ranks: tensor, context, data, pipeline.

    Attributes:
        tensor, pipeline, context, expert, expert_tensor: sizes of the axes.
        ranks: number of ranks.
        stage_of_layer: pipeline stage of each layer.
    """

    ranks: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    stage_of_layer: Sequence[int]

    @property
    def ranks_per_stage(self) -> int:
        """Number of ranks of a pipeline stage, over all replicas."""
        return self.ranks // self.pipeline

    def dense_ranks(self, stage: int, tensor: int) -> list[int]:
        """Return the ranks that hold a stage's dense shard of this tensor-parallel index."""
        first = stage * self.ranks_per_stage + tensor
        return list(range(first, (stage + 1) * self.ranks_per_stage, self.tensor))

    def expert_ranks(self, stage: int, expert: int, tensor: int) -> list[int]:
        """Return the ranks that hold a stage's shard of these experts, by expert- and expert-tensor-parallel index."""
        first = stage * self.ranks_per_stage + expert * self.expert_tensor + tensor
        return list(range(first, (stage + 1) * self.ranks_per_stage, self.expert * self.expert_tensor))


@dataclass(frozen=True)
class EngineLayout:
    """An engine of SGLang's numbering: expert-parallel ranks are blocks of consecutive tensor-parallel ranks.

    Attributes:
        tensor: ranks, which shard attention, dense layers and the vocabulary.
        expert: parts of the experts of a layer; divides ``tensor``, and the rest shards each expert.
        vocabulary_multiple: vocabulary rows are padded to a multiple of this.
    """

    tensor: int
    expert: int = 1
    vocabulary_multiple: int = 64

    @property
    def expert_tensor(self) -> int:
        """Ranks that shard one expert."""
        return self.tensor // self.expert
