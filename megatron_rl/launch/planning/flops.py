"""Operations and bytes of a step: scoring, training, sampling, and the exchange between ranks.

A product of [m, k] and [k, n] is 2 m k n operations. Every sequence is taken as the longest: an upper bound.
"""

from dataclasses import dataclass

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.layout import Layout
from megatron_rl.launch.planning.parameters import active_parameters, parameters_of, total_parameters
from megatron_rl.launch.planning.saved import share_of
from megatron_rl.launch.planning.stages import stages_of
from megatron_rl.launch.planning.widths import Widths, Work, widths_of
from megatron_rl.models.hf_mapping.rules import Family


@dataclass(frozen=True)
class Step:
    """A step of the whole run.

    Attributes:
        tokens: prompts and responses.
        score, train, generate: operations, over all ranks or servers.
        weight_bytes: of one push: the whole model in the weights' type.
        cache_bytes: keys and values of all responses of a step at their full length.
        passes: over the weights that decode the responses, if all are decoded at once.
        cache_reads: bytes of keys and values that they read.
    """

    tokens: int
    score: float
    train: float
    generate: float
    weight_bytes: int
    cache_bytes: int
    passes: int
    cache_reads: float

    def decode_bytes(self, copies: int) -> float:
        """Return the bytes that so many copies of the model read from memory to decode the responses of a step."""
        return self.passes * copies * self.weight_bytes + self.cache_reads


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one optimizer step, by axis.

    Attributes:
        tensor: hidden states, in and out of each layer's two halves.
        expert: tokens to their experts and back.
        pipeline: hidden states to the next stage, gradients to the one before.
        data: gradients, and the new weights of a distributed optimizer.
    """

    tensor: float
    expert: float
    pipeline: float
    data: float


def forward_per_token(family: Family, length: int) -> float:
    """Return the operations of one token on its way through the layers, in a sequence of this length."""
    return 2 * _layer_parameters(family) + attention_per_token(family, length)


def attention_per_token(family: Family, length: int) -> float:
    """Return the operations of attention's two products; a token sees half of its sequence on average, or a window."""
    widths, layers = widths_of(family), family.num_layers
    seen = widths.windowed * min(length / 2, widths.window) + (layers - widths.windowed) * length / 2
    return 2 * widths.heads * (widths.query + widths.value) * seen


def head_per_token(family: Family) -> float:
    """Return the operations of one product with the vocabulary."""
    widths = widths_of(family)
    return 2 * widths.hidden * widths.vocabulary


def step_of(run: Run, family: Family, *, longest: int, prompt: int) -> Step:
    """Return the operations and bytes of a step; ``prompt`` and ``longest`` are tokens of the longest sequence."""
    sequences = run.train.prompts_per_step * run.train.group_size
    tokens, new = sequences * longest, sequences * (longest - prompt)
    layers, attention = forward_per_token(family, longest), attention_per_token(family, longest)
    again = {"none": 0.0, "selective": attention, "full": layers}[run.model.recompute]
    passes = 2 if run.kl.coefficient else 1
    head = head_per_token(family)
    size = 2 if run.model.dtype == "bfloat16" else 4
    cache = cache_per_token(widths_of(family), size) * family.num_layers
    weights = total_parameters(family) * size
    return Step(
        tokens=tokens,
        score=passes * (tokens * layers + new * head),
        train=tokens * (3 * layers + again) + new * 4 * head,  # the head's logits are computed again
        generate=sequences * (longest * layers + (longest - prompt) * head),
        weight_bytes=weights,
        cache_bytes=tokens * cache,
        passes=longest - prompt,
        cache_reads=(longest - prompt) * sequences * cache * (longest + prompt) / 2,
    )


def cache_per_token(widths: Widths, size: int) -> int:
    """Return the bytes of one token's keys and values in one layer; latent attention caches the latents."""
    if widths.latent_rank:
        return (widths.latent_rank + widths.rotary) * size
    return widths.kv_heads * (widths.query + widths.value) * size


def traffic_of(run: Run, family: Family, layout: Layout, work: Work, rows: int) -> Traffic:
    """Return what a rank of the first stage sends in an optimizer step of so many micro-batches a rank."""
    widths, stage = widths_of(family), stages_of(family.num_layers, layout)[0]
    share, size = share_of(work, widths, layout), work.bytes
    counts = parameters_of(family, layout, stage)
    sparse = sum(1 for layer in stage.layers if layer not in family.dense_layers) if family.num_experts else 0
    forwards = 3 + (run.model.recompute == "full")  # backward sends twice what forward does

    def others(size: int) -> float:
        return (size - 1) / size

    activations = rows * forwards * len(stage.layers) * 4 * share.T * widths.hidden * size
    routed = rows * forwards * sparse * share.S * widths.per_token * widths.hidden * size
    each = max(size, 4) + size if run.parallel.distributed_optimizer else 2 * max(size, 4)
    dense = counts.dense * others(layout.data * layout.context)
    return Traffic(
        tensor=activations * others(layout.tensor),
        expert=2 * routed * others(layout.expert),
        pipeline=2 * rows * layout.virtual_pipeline * share.S * widths.hidden * size * (layout.pipeline > 1),
        data=each * (dense + counts.expert * others(layout.expert_data)),
    )


def expert_share(family: Family, length: int) -> float:
    """Return the share of a token's operations in the layers that its experts do."""
    widths, sparse = widths_of(family), family.num_layers - len(family.dense_layers)
    mine = 2 * 3 * widths.hidden * widths.expert_ffn * widths.per_token * sparse if widths.experts else 0
    return mine / forward_per_token(family, length)


def expert_efficiency(family: Family, layout: Layout, work: Work) -> float:
    """Return how fast experts' products run against large ones: an assumption, small products are slower.

    A product of m rows and n columns is taken to reach m / (m + 128) * n / (n + 256) of a large one's pace.
    """
    widths = widths_of(family)
    rows = share_of(work, widths, layout).R * layout.expert / widths.experts
    columns = widths.expert_ffn / layout.expert_tensor
    return rows / (rows + 128) * columns / (columns + 256)


def bubble(layout: Layout, rows: int) -> float:
    """Return the share of a step's time that a pipeline rank waits."""
    waits = (layout.pipeline - 1) / layout.virtual_pipeline
    return waits / (rows + waits)


def _layer_parameters(family: Family) -> int:
    """Return the parameters that work on a token inside the layers: no embedding, no head."""
    widths = widths_of(family)
    ends = widths.hidden * widths.vocabulary * (1 if family.tied else 2)
    return active_parameters(family) - ends
