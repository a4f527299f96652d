"""Sizes of all mesh axes, and the checks that refuse an invalid layout before any process starts."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import MegatronValue, Parallel, Run
from megatron_rl.launch.planning.model_sizes import ModelSizes

DescribeSetting = Callable[[str], str]
"""Maps the name of a parallel setting to its key, its value and where it was set."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all mesh axes, derived ones included.

    Attributes:
        first_layers, last_layers: layers of the first and the last pipeline stage; None: as many as the others.
    """

    ranks: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    expert: int
    expert_tensor: int
    sequence: bool
    first_layers: int | None = None
    last_layers: int | None = None

    @property
    def is_uneven(self) -> bool:
        """Whether the first or the last pipeline stage has a configured number of layers."""
        return self.first_layers is not None or self.last_layers is not None

    def stage_sizes(self, layers: int) -> tuple[int, ...]:
        """Return the layers per pipeline stage of an uneven layout; the middle stages share the rest equally."""
        first, last = _as_list(self.first_layers), _as_list(self.last_layers)
        middle = self.pipeline - len(first) - len(last)
        per_stage = (layers - sum(first) - sum(last)) // max(middle, 1)
        return (*first, *[per_stage] * middle, *last)

    @property
    def data(self) -> int:
        """Data-parallel size: model replicas that train on different sequences."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Expert-data-parallel size: replicas of each expert."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
"""Fields of ``model.megatron`` that set the number of layers of the first and the last pipeline stage."""


def layout_of(
    parallel: Parallel, ranks: int | None = None, megatron: Mapping[str, MegatronValue] | None = None
) -> ParallelLayout:
    """Return the layout for ``ranks`` ranks, else ``parallel.ranks``, else the fewest that the axes allow."""
    fields = megatron or {}
    return ParallelLayout(
        ranks=ranks or parallel.ranks or parallel.min_ranks,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor_size,
        sequence=parallel.sequence_parallel,
        first_layers=_count(fields.get(FIRST)),
        last_layers=_count(fields.get(LAST)),
    )


def _count(value: MegatronValue | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_layout(loaded: Loaded[Run], layout: ParallelLayout, sizes: ModelSizes, *, on_gloo: bool) -> list[str]:
    """Return the problems of a layout, one sentence each: the values, where they were set, and what to write."""

    def setting(name: str) -> str:
        key = f"parallel.{name}"
        return f"{key} = {getattr(layout, name)} ({loaded.origin(key)})"

    return [
        *_check_ranks(
            layout, setting("ranks") if loaded.run.parallel.ranks == layout.ranks else f"{layout.ranks} ranks"
        ),
        *_check_divisibility(layout, sizes, setting),
        *_check_experts(layout, sizes, setting, on_gloo=on_gloo),
        *_check_attention(layout, sizes, setting, on_gloo=on_gloo),
        *_check_pipeline(layout, sizes, setting),
        *_check_uneven_stages(loaded, layout, sizes),
    ]


def _check_ranks(layout: ParallelLayout, ranks: str) -> Iterator[str]:
    dense = layout.tensor * layout.pipeline * layout.context
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    for product, names in ((dense, "tensor * pipeline * context"), (experts, "expert * expert_tensor * pipeline")):
        if layout.ranks % product:
            fitting = _nearest_multiples(layout.ranks, math.lcm(dense, experts))
            yield f"{ranks} cannot be divided by {names} = {product}; use {fitting} ranks"


def _check_divisibility(layout: ParallelLayout, sizes: ModelSizes, setting: DescribeSetting) -> Iterator[str]:
    checks = [
        ("tensor", layout.tensor, "attention heads", sizes.heads),
        ("tensor", layout.tensor, "key-value heads", sizes.kv_heads),
    ]
    if sizes.has_dense_layers:
        checks.append(("tensor", layout.tensor, "feed-forward width", sizes.ffn))
    if sizes.experts:
        checks.append(("expert", layout.expert, "experts", sizes.experts))
        checks.append(("expert_tensor", layout.expert_tensor, "expert width", sizes.expert_ffn))
    for name, size, what, total in checks:
        if total % size:
            yield f"{setting(name)} does not divide the model's {what}, {total}; write {_nearest_divisors(total, size)}"


def _check_experts(
    layout: ParallelLayout, sizes: ModelSizes, setting: DescribeSetting, *, on_gloo: bool
) -> Iterator[str]:
    if not sizes.experts:
        for name, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
            if size > 1 and not (name == "expert_tensor" and size == layout.tensor):
                yield f"{setting(name)}, but the model has no experts; leave it out"
        return
    if layout.tensor > 1 and not layout.sequence:
        yield (
            f"{setting('sequence')} with {setting('tensor')}: megatron-core trains experts under tensor parallelism"
            " only with sequence parallelism; leave parallel.sequence out"
        )
    if sizes.experts_have_bias and not on_gloo and layout.expert_tensor > 1:
        yield (
            f"{setting('expert_tensor')}, and the model's experts have biases: transformer-engine's layers would add a"
            " bias once per rank of that axis; write expert_tensor = 1, and an expert axis above 1"
        )
    if on_gloo and layout.expert > 1 and layout.expert_tensor > 1:
        yield (
            f"{setting('expert_tensor')} with {setting('expert')}: the exchange needs all-gathers of uneven sizes,"
            " which gloo (ranks without a GPU) does not support; write expert_tensor = 1 or expert = 1"
        )


def _check_attention(
    layout: ParallelLayout, sizes: ModelSizes, setting: DescribeSetting, *, on_gloo: bool
) -> Iterator[str]:
    heads, kv_heads = sizes.heads // layout.tensor, sizes.kv_heads // layout.tensor
    special = sizes.attention_sinks or sizes.windowed_layers
    if special and not on_gloo and (heads % layout.context or kv_heads % layout.context):
        yield (
            f"{setting('context')}: with sinks or windows, transformer-engine shares out heads over context ranks,"
            f" and a tensor rank has {heads} query and {kv_heads} key-value heads; write"
            f" {_nearest_divisors(kv_heads, layout.context)}"
        )


def _check_pipeline(layout: ParallelLayout, sizes: ModelSizes, setting: DescribeSetting) -> Iterator[str]:
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        yield f"{setting('virtual_pipeline')} needs a pipeline; set parallel.pipeline above 1, or leave it out"
    chunks = layout.pipeline * layout.virtual_pipeline
    if sizes.layers % chunks and not layout.is_uneven:
        fitting = _nearest_divisors(sizes.layers, chunks)
        yield (
            f"{setting('pipeline')} times {setting('virtual_pipeline')} is {chunks} and does not divide the model's"
            f" {sizes.layers} layers; make the product {fitting}, or set the number of layers of the first or last"
            f" stage: model.megatron.{FIRST}, model.megatron.{LAST}"
        )
    if layout.sequence and layout.tensor == 1:
        yield f"{setting('sequence')} shares activations over the tensor axis, which has one rank; leave it out"


def _check_uneven_stages(loaded: Loaded[Run], layout: ParallelLayout, sizes: ModelSizes) -> Iterator[str]:
    megatron = loaded.run.model.megatron
    names = [name for name in (FIRST, LAST) if name in megatron]
    if not names:
        return
    settings = ", ".join(
        f"model.megatron.{name} = {megatron[name]!r} ({loaded.origin(f'model.megatron.{name}')})" for name in names
    )
    if any(_count(megatron[name]) is None for name in names):
        yield f"{settings}: the number of layers must be a whole number above 0"
    elif layout.pipeline < len(names) or layout.pipeline == 1:
        yield f"{settings} needs a pipeline of stages; set parallel.pipeline above 1, or leave it out"
    elif layout.virtual_pipeline > 1:
        yield f"{settings} with parallel.virtual_pipeline = {layout.virtual_pipeline} is not supported; leave one out"
    elif sum(layout.stage_sizes(sizes.layers)) != sizes.layers or 0 in layout.stage_sizes(sizes.layers):
        ends = _as_list(layout.first_layers) + _as_list(layout.last_layers)
        yield (
            f"{settings}: {sizes.layers - sum(ends)} of the model's {sizes.layers} layers are left for the"
            f" {layout.pipeline - len(ends)} other pipeline stages, which need equal numbers of layers, at least one;"
            " change these numbers or parallel.pipeline"
        )


def _as_list(count: int | None) -> list[int]:
    return [] if count is None else [count]


def _nearest_divisors(total: int, near: int) -> str:
    """Return the nearest divisors of ``total`` below and above ``near``, joined by "or"."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    below = [size for size in divisors if size < near][-1:]
    above = [size for size in divisors if size > near][:1]
    return " or ".join(map(str, below + above))


def _nearest_multiples(near: int, of: int) -> str:
    below = near // of * of
    return " or ".join(str(size) for size in (below, below + of) if size)
