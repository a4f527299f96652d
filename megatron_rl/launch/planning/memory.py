"""Memory per rank: weights, gradients, optimizer state, activations and buffers."""

from dataclasses import dataclass

from megatron_rl.config.schema import MegatronValue, Run
from megatron_rl.launch.planning.activations import ActivationMemory, Recompute, activation_memory
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
        optimizer: moments, and main weights under bfloat16; a shard with a distributed optimizer.
        host_optimizer: the part of the optimizer in host memory (``optimizer_cpu_offload``).
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
    host_optimizer: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        persistent = self.parameters + self.gradients + self.optimizer + self.reserved
        return persistent + max(self.activations.total, self.reduction, self.push)


def stage_memory(
    run: Run, family: Family, layout: ParallelLayout, work: MicrobatchWork, microbatches: int
) -> tuple[RankMemory, ...]:
    """Return the memory per rank of each pipeline stage; a rank runs ``microbatches`` per optimizer step."""
    sizes, recompute = model_sizes(family), Recompute.of(run.model)
    memories = []
    for stage in pipeline_stages(family.num_layers, layout):
        counts = parameter_counts(family, layout, stage)
        gradients = counts.total * max(work.dtype_bytes, 4)
        optimizer = optimizer_memory(run, counts, layout, work)
        memories.append(
            RankMemory(
                stage=stage,
                counts=counts,
                parameters=counts.total * work.dtype_bytes,
                gradients=gradients,
                optimizer=optimizer.device,
                activations=activation_memory(family, sizes, layout, stage, work, recompute, microbatches),
                reduction=0 if work.fused else gradients,
                push=run.weights.bucket_bytes + largest_stack(family) * work.dtype_bytes,
                reserved=RESERVED_BYTES if work.fused else 0,
                host_reference=counts.total * work.dtype_bytes if run.kl.coefficient else 0,
                host_optimizer=optimizer.host,
            )
        )
    return tuple(memories)


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of the optimizer per rank, on the device and in host memory."""

    device: int
    host: int


def optimizer_memory(
    run: Run, counts: ParameterCounts, layout: ParallelLayout, work: MicrobatchWork
) -> OptimizerMemory:
    """Return the bytes of moments and main weights per rank.

    An offloaded parameter has moments, a float32 copy and a gradient in host memory; its main weight under bfloat16
    stays on the device too, except with a precision-aware optimizer.
    """
    fields, wide = run.optimizer.megatron, max(work.dtype_bytes, 4)
    moments = sum(_field_bytes(fields.get(name), wide) for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    main = _main_bytes(run) if work.dtype_bytes < 4 else 0
    if fields.get("optimizer") == "muon":
        return OptimizerMemory((wide + main) * counts.total + (moments - wide) * counts.not_matrices, 0)
    elements = counts.total
    if run.parallel.distributed_optimizer:
        elements = -(-counts.dense // (layout.data * layout.context)) + -(-counts.expert // layout.expert_data)
    fraction = fields.get("optimizer_offload_fraction", 0.0) if fields.get("optimizer_cpu_offload") else 0.0
    offloaded = int(elements * float(str(fraction)))
    on_device = 0 if fields.get("use_precision_aware_optimizer") else main
    return OptimizerMemory((moments + main) * (elements - offloaded) + on_device * offloaded, (moments + 8) * offloaded)


def _main_bytes(run: Run) -> int:
    """Return the bytes per main weight under bfloat16; a precision-aware optimizer stores 16 bits beside the weight."""
    fields = run.optimizer.megatron
    if fields.get("use_precision_aware_optimizer") and fields.get("store_param_remainders", True):
        return 2
    return _field_bytes(fields.get("main_params_dtype"), 4)


def _field_bytes(dtype: MegatronValue | None, default: int) -> int:
    """Return the bytes per element of a dtype, written as its name."""
    return {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}.get(str(dtype), default)


def fullest(memories: tuple[RankMemory, ...]) -> RankMemory:
    """Return the memory of the pipeline stage that needs most."""
    return max(memories, key=lambda memory: memory.total)
