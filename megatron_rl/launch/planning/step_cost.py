"""FLOPs and bytes per step: log-probs, training, generation, and communication between ranks.

A product of an [m, k] and a [k, n] matrix is 2 m k n FLOPs. Every sequence is counted at the maximum length, so the
results are upper bounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import Recompute
from megatron_rl.launch.planning.layout import ParallelLayout
from megatron_rl.launch.planning.microbatch import MicrobatchWork, rank_tokens
from megatron_rl.launch.planning.model_sizes import ModelSizes, model_sizes
from megatron_rl.launch.planning.parameters import active_parameters, parameter_counts, total_parameters
from megatron_rl.launch.planning.stages import pipeline_stages
from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class StepCost:
    """Cost of one step of the whole run.

    Attributes:
        tokens: prompt and response tokens.
        logprob_flops: FLOPs of computing log-probs, over all ranks.
        train_flops: FLOPs of training, over all ranks.
        generate_flops: FLOPs of generation, over all servers.
        weight_bytes: bytes of the whole model in ``model.dtype``; one weight push sends them.
        cache_bytes: KV cache of all responses at full length.
        decode_passes: forward passes that decode the responses if all are decoded together.
        cache_reads: bytes of KV cache that these passes read.
    """

    tokens: int
    logprob_flops: float
    train_flops: float
    generate_flops: float
    weight_bytes: int
    cache_bytes: int
    decode_passes: int
    cache_reads: float

    def decode_bytes(self, copies: int) -> float:
        """Return the bytes that ``copies`` copies of the model read from memory to decode the responses."""
        return self.decode_passes * copies * self.weight_bytes + self.cache_reads


@dataclass(frozen=True)
class RankTraffic:
    """Bytes that one rank sends per optimizer step, by axis.

    Attributes:
        tensor: hidden states before and after attention and the network of each layer.
        expert: tokens to their experts and back.
        pipeline: hidden states to the next stage, gradients to the previous one.
        data: gradients, and updated weights with a distributed optimizer.
    """

    tensor: float
    expert: float
    pipeline: float
    data: float


def forward_per_token(family: Family, length: int) -> float:
    """Return the FLOPs of the layers per token, in a sequence of ``length`` tokens."""
    return 2 * _layer_parameters(family) + attention_per_token(family, length)


def attention_per_token(family: Family, length: int) -> float:
    """Return the FLOPs of the two attention products per token, which sees half of its sequence, or a window."""
    sizes = model_sizes(family)
    full_layers = sizes.layers - sizes.windowed_layers
    seen = sizes.windowed_layers * min(length / 2, sizes.window) + full_layers * length / 2
    return 2 * sizes.heads * (sizes.query_dim + sizes.value_dim) * seen


MODULE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "moe": (".mlp.router.", ".mlp.experts.", ".mlp.shared_experts."),
    "mlp": (".mlp.linear_",),
    "shared_experts": (".mlp.shared_experts.",),
    "mla_up_proj": (".linear_q_up_proj.", ".linear_kv_up_proj."),
}
"""Parts of the parameter names of the modules that can be recomputed; activations and norms count as nothing."""


def recomputed_per_token(run: Run, family: Family, length: int) -> float:
    """Return the FLOPs per token that the backward pass repeats (``model.recompute``)."""
    recompute = Recompute.of(run.model)
    if recompute.layers:
        return forward_per_token(family, length)
    parts = tuple(part for module in recompute.modules for part in MODULE_PARAMETERS.get(module, ()))
    mappings = [mapping for mapping in family.mappings if any(part in mapping.megatron for part in parts)]
    attention = attention_per_token(family, length) if "core_attn" in recompute.modules else 0.0
    return attention + 2 * active_parameters(replace(family, mappings=tuple(mappings)))


def head_per_token(family: Family) -> float:
    """Return the FLOPs of one output-head product per token."""
    sizes = model_sizes(family)
    return 2 * sizes.hidden * sizes.vocabulary


def step_cost(run: Run, family: Family, *, longest: int, prompt: int) -> StepCost:
    """Return the cost of a step whose sequences have ``longest`` tokens, ``prompt`` of them in the prompt."""
    sequences = run.train.prompts_per_step * run.train.group_size
    tokens, new = sequences * longest, sequences * (longest - prompt)
    layers = forward_per_token(family, longest)
    recomputed = recomputed_per_token(run, family, longest)
    policies = 2 if run.kl.coefficient else 1
    head = head_per_token(family)
    dtype_bytes = 2 if run.model.dtype == "bfloat16" else 4
    cache = cache_per_token(model_sizes(family), dtype_bytes) * family.num_layers
    return StepCost(
        tokens=tokens,
        logprob_flops=policies * (tokens * layers + new * head),
        train_flops=tokens * (3 * layers + recomputed) + new * 4 * head,  # backward recomputes the logits
        generate_flops=sequences * (longest * layers + (longest - prompt) * head),
        weight_bytes=total_parameters(family) * dtype_bytes,
        cache_bytes=tokens * cache,
        decode_passes=longest - prompt,
        cache_reads=(longest - prompt) * sequences * cache * (longest + prompt) / 2,
    )


def cache_per_token(sizes: ModelSizes, dtype_bytes: int) -> int:
    """Return the bytes of KV cache per token and layer; latent attention caches the latents."""
    if sizes.latent_rank:
        return (sizes.latent_rank + sizes.rotary_dim) * dtype_bytes
    return sizes.kv_heads * (sizes.query_dim + sizes.value_dim) * dtype_bytes


def rank_traffic(
    run: Run, family: Family, layout: ParallelLayout, work: MicrobatchWork, microbatches: int
) -> RankTraffic:
    """Return what a rank of the first stage sends per optimizer step of ``microbatches`` micro-batches per rank."""
    sizes, stage = model_sizes(family), pipeline_stages(family.num_layers, layout)[0]
    tokens, dtype_bytes = rank_tokens(work, sizes, layout), work.dtype_bytes
    counts = parameter_counts(family, layout, stage)
    sparse = sum(1 for layer in stage.layers if layer not in family.dense_layers) if family.num_experts else 0
    passes = microbatches * (3 + (run.model.recompute == "full"))  # backward sends twice what forward does

    def to_others(ranks: int) -> float:
        return (ranks - 1) / ranks

    hidden_bytes = sizes.hidden * dtype_bytes
    tensor = passes * len(stage.layers) * 4 * tokens.attention * hidden_bytes
    routed = passes * sparse * tokens.residual * sizes.experts_per_token * hidden_bytes
    gradient = max(dtype_bytes, 4)
    per_parameter = gradient + dtype_bytes if run.parallel.distributed_optimizer else 2 * gradient
    dense = counts.dense * to_others(layout.data * layout.context)
    chunks = microbatches * layout.virtual_pipeline * (layout.pipeline > 1)
    return RankTraffic(
        tensor=tensor * to_others(layout.tensor),
        expert=2 * routed * to_others(layout.expert),
        pipeline=2 * chunks * tokens.residual * hidden_bytes,
        data=per_parameter * (dense + counts.expert * to_others(layout.expert_data)),
    )


def expert_fraction(family: Family, length: int) -> float:
    """Return the fraction of the layers' FLOPs that the routed experts take."""
    sizes, sparse = model_sizes(family), family.num_layers - len(family.dense_layers)
    experts = 2 * 3 * sizes.hidden * sizes.expert_ffn * sizes.experts_per_token * sparse if sizes.experts else 0
    return experts / forward_per_token(family, length)


def expert_efficiency(family: Family, layout: ParallelLayout, work: MicrobatchWork) -> float:
    """Return the assumed speed of the experts' products relative to large products.

    A product of m rows and n columns is assumed to reach m / (m + 128) * n / (n + 256) of a large product's speed.
    """
    sizes = model_sizes(family)
    rows = rank_tokens(work, sizes, layout).expert * layout.expert / sizes.experts
    columns = sizes.expert_ffn / layout.expert_tensor
    return rows / (rows + 128) * columns / (columns + 256)


def pipeline_bubble(layout: ParallelLayout, microbatches: int) -> float:
    """Return the fraction of a step that a pipeline rank idles; a rank runs ``microbatches`` per optimizer step."""
    idle = (layout.pipeline - 1) / layout.virtual_pipeline
    return idle / (microbatches + idle)


def _layer_parameters(family: Family) -> int:
    """Return the parameters inside the layers that one token uses: no embedding, no output head."""
    sizes = model_sizes(family)
    ends = sizes.hidden * sizes.vocabulary * (1 if family.tied else 2)
    return active_parameters(family) - ends
