"""The memory of each rank: weights, gradients, optimizer, activations and buffers, against what a GPU has."""

from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import Activations, activations_of
from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.parameters import Parameters, largest_stack, parameters_of
from megatron_rl.launch.planning.stages import Stage, stages_of
from megatron_rl.launch.planning.widths import Work, widths_of
from megatron_rl.models.hf_mapping.rules import Family

GIB = 1 << 30

RESERVED_BYTES = 4 * GIB
"""Assumed on a GPU besides what is counted: the CUDA context, NCCL's buffers, gaps of the allocator."""

NUMBER_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of each rank of one pipeline stage.

    Attributes:
        stage: the stage.
        counts: its parameters.
        parameters: in the type that the forward pass reads.
        gradients: float32 under bfloat16; reduced in place, so that no bucket is held besides.
        optimizer: two moments, and under bfloat16 the float32 weights; a share of it if it is distributed.
        activations: see ``Activations``; tokens on their way to and from experts are part of it.
        reduction: a copy of the gradients, which gloo's reduction makes and NCCL's does not.
        push: what is held besides the shards while new weights go to the fleet: between steps. Where the experts of a
            layer are one tensor, the rank that sends it on has that too.
        reserved: not counted, assumed.
        host_reference: the reference policy, in the host's memory; twice as much while it scores.
    """

    stage: Stage
    counts: Parameters
    parameters: int
    gradients: int
    optimizer: int
    activations: Activations
    reduction: int
    push: int
    reserved: int
    host_reference: int

    @property
    def total(self) -> int:
        """The most that is held at any one time."""
        standing = self.parameters + self.gradients + self.optimizer + self.reserved
        return standing + max(self.activations.total, self.reduction, self.push)


def work_of(run: Run, layout: Layout, longest: int, *, fused: bool) -> Work:
    """Return a full row: the longest sequences, as many as fit, of whose tokens any may be trained."""
    row = run.train.tokens_per_microbatch if run.train.packing else longest
    multiple = max(2 * layout.context if layout.context > 1 else 1, 1) * layout.tensor
    row = -(-row // multiple) * multiple
    size = NUMBER_BYTES[run.model.dtype]
    return Work(row, min(longest, row), row, size, run.cluster.expert_imbalance, fused)


def memory_of(run: Run, family: Family, layout: Layout, work: Work, rows: int) -> tuple[RankMemory, ...]:
    """Return the memory of a rank of each pipeline stage; ``rows`` micro-batches of a rank make an optimizer step."""
    widths = widths_of(family)
    memories = []
    for stage in stages_of(family.num_layers, layout):
        counts = parameters_of(family, layout, stage)
        activations = activations_of(family, widths, layout, stage, work, run.model.recompute, rows)
        gradients = counts.total * max(work.bytes, 4)
        memories.append(
            RankMemory(
                stage=stage,
                counts=counts,
                parameters=counts.total * work.bytes,
                gradients=gradients,
                optimizer=optimizer_bytes(run, counts, layout, work),
                activations=activations,
                reduction=0 if work.fused else gradients,
                push=run.weights.bucket_bytes + largest_stack(family) * work.bytes,
                reserved=RESERVED_BYTES if work.fused else 0,
                host_reference=counts.total * work.bytes if run.kl.coefficient else 0,
            )
        )
    return tuple(memories)


def optimizer_bytes(run: Run, counts: Parameters, layout: Layout, work: Work) -> int:
    """Return the bytes of Adam's moments and main weights that a rank holds."""
    each = 2 * max(work.bytes, 4) + (4 if work.bytes < 4 else 0)
    if not run.parallel.distributed_optimizer:
        return each * counts.total
    return each * (-(-counts.dense // (layout.data * layout.context)) + -(-counts.expert // layout.expert_data))


def worst(memories: tuple[RankMemory, ...]) -> RankMemory:
    """Return the stage whose ranks need most."""
    return max(memories, key=lambda memory: memory.total)
