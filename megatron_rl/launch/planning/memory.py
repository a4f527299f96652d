"""Memory per rank: weights, gradients, optimizer state, activations and buffers."""

from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import ActivationMemory, activation_memory
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.microbatch import MicrobatchWork
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.launch.planning.parameters import ParameterCounts, largest_stack, parameter_counts
from megatron_rl.launch.planning.stages import PipelineStage, pipeline_stages
from megatron_rl.models.hf_mapping.rules import Family

GIB = 1 << 30

RESERVED_BYTES = 4 * GIB
"""Assumed for the CUDA context, NCCL's buffers and allocator fragmentation, per GPU."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes per rank of one pipeline stage.

    Attributes:
        stage: the pipeline stage.
        counts: parameters per rank.
        parameters: weights in ``model.dtype``.
        gradients: float32 under bfloat16; reduced in place, without extra buckets.
        optimizer: Adam's two moments, and float32 weights under bfloat16; a shard with a distributed optimizer.
        activations: activation memory; buffers of tokens sent to and from experts included.
        reduction: the copy of the gradients that gloo makes; 0 with NCCL.
        push: buffers of a weight push, between steps. Where a layer's experts are one tensor, the sender holds it.
        reserved: assumed overhead on a GPU.
        host_reference: weights of the reference policy in host memory; doubled while it computes log-probs.
    """

    stage: PipelineStage
    counts: ParameterCounts
    parameters: int
    gradients: int
    optimizer: int
    activations: ActivationMemory
    reduction: int
    push: int
    reserved: int
    host_reference: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        persistent = self.parameters + self.gradients + self.optimizer + self.reserved
        return persistent + max(self.activations.total, self.reduction, self.push)


def stage_memory(
    run: Run, family: Family, layout: ParallelLayout, work: MicrobatchWork, microbatches: int
) -> tuple[RankMemory, ...]:
    """Return the memory per rank of each pipeline stage; a rank runs ``microbatches`` per optimizer step."""
    sizes = model_sizes(family)
    memories = []
    for stage in pipeline_stages(family.num_layers, layout):
        counts = parameter_counts(family, layout, stage)
        gradients = counts.total * max(work.dtype_bytes, 4)
        memories.append(
            RankMemory(
                stage=stage,
                counts=counts,
                parameters=counts.total * work.dtype_bytes,
                gradients=gradients,
                optimizer=optimizer_bytes(run, counts, layout, work),
                activations=activation_memory(family, sizes, layout, stage, work, run.model.recompute, microbatches),
                reduction=0 if work.fused else gradients,
                push=run.weights.bucket_bytes + largest_stack(family) * work.dtype_bytes,
                reserved=RESERVED_BYTES if work.fused else 0,
                host_reference=counts.total * work.dtype_bytes if run.kl.coefficient else 0,
            )
        )
    return tuple(memories)


def optimizer_bytes(run: Run, counts: ParameterCounts, layout: ParallelLayout, work: MicrobatchWork) -> int:
    """Return the bytes of Adam's moments and float32 weights per rank."""
    size = work.dtype_bytes
    per_parameter = 2 * max(size, 4) + (4 if size < 4 else 0)
    if not run.parallel.distributed_optimizer:
        return per_parameter * counts.total
    dense = -(-counts.dense // (layout.data * layout.context))
    return per_parameter * (dense + -(-counts.expert // layout.expert_data))


def fullest(memories: tuple[RankMemory, ...]) -> RankMemory:
    """Return the memory of the pipeline stage that needs most."""
    return max(memories, key=lambda memory: memory.total)
