"""Sizes of the mesh axes as they come out, and everything that can be wrong with them before a process starts."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Parallel, Run
from megatron_rl.launch.planning.shape import Shape

Said = Callable[[str], str]
"""Words a parallel setting by its name: key, value, where it was set."""


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes, the ones that follow from others included."""

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
        """Whether the first or the last pipeline stage has a number of layers of its own."""
        return self.first_layers is not None or self.last_layers is not None

    def stage_sizes(self, layers: int) -> tuple[int, ...]:
        """Return the layers of each pipeline stage where they are uneven; the stages between share what is left."""
        first, last = _given(self.first_layers), _given(self.last_layers)
        between = self.pipeline - len(first) - len(last)
        share = (layers - sum(first) - sum(last)) // max(between, 1)
        return (*first, *[share] * between, *last)

    @property
    def data(self) -> int:
        """Copies of the dense weights that see different sequences."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
"""Fields of ``model.megatron`` by which a first or last stage gets a number of layers of its own."""


def layout_of(
    parallel: Parallel, ranks: int | None = None, megatron: Mapping[str, bool | int | float | str] | None = None
) -> Layout:
    """Return the axes; without ``ranks`` as many ranks as the config asks for, or the fewest that its sizes allow."""
    fields = megatron or {}
    follows = parallel.tensor if parallel.expert == 1 else 1
    expert_tensor = follows if parallel.expert_tensor is None else parallel.expert_tensor
    fewest = math.lcm(parallel.tensor * parallel.context, parallel.expert * expert_tensor) * parallel.pipeline
    return Layout(
        ranks=ranks or parallel.ranks or fewest,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=expert_tensor,
        sequence=parallel.tensor > 1 if parallel.sequence is None else parallel.sequence,
        first_layers=_count(fields.get(FIRST)),
        last_layers=_count(fields.get(LAST)),
    )


def _count(value: bool | int | float | str | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_layout(loaded: Loaded[Run], layout: Layout, shape: Shape, *, on_gloo: bool) -> list[str]:
    """Return all that is wrong with a layout, one sentence a problem: numbers, where they were set, what to write."""

    def said(name: str) -> str:
        key = f"parallel.{name}"
        return f"{key} = {getattr(layout, name)} ({loaded.origin(key)})"

    return [
        *_ranks(layout, said("ranks") if loaded.run.parallel.ranks == layout.ranks else f"{layout.ranks} ranks"),
        *_divisions(layout, shape, said),
        *_experts(layout, shape, said, on_gloo=on_gloo),
        *_attention(layout, shape, said, on_gloo=on_gloo),
        *_pipeline(layout, shape, said),
        *_uneven(loaded, layout, shape),
    ]


def _ranks(layout: Layout, ranks: str) -> Iterator[str]:
    dense = layout.tensor * layout.pipeline * layout.context
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    for product, names in ((dense, "tensor * pipeline * context"), (experts, "expert * expert_tensor * pipeline")):
        if layout.ranks % product:
            fitting = _multiples(layout.ranks, math.lcm(dense, experts))
            yield f"{ranks} cannot be shared by {names} = {product}; use {fitting} ranks"


def _divisions(layout: Layout, shape: Shape, said: Said) -> Iterator[str]:
    checks = [
        ("tensor", layout.tensor, "attention heads", shape.heads),
        ("tensor", layout.tensor, "key-value heads", shape.kv_heads),
    ]
    if shape.has_dense_layers:
        checks.append(("tensor", layout.tensor, "feed-forward width", shape.ffn))
    if shape.experts:
        checks.append(("expert", layout.expert, "experts", shape.experts))
        checks.append(("expert_tensor", layout.expert_tensor, "width of an expert", shape.expert_ffn))
    for name, size, what, total in checks:
        if total % size:
            yield f"{said(name)} does not divide the model's {what}, {total}; write {_divisors(total, size)}"


def _experts(layout: Layout, shape: Shape, said: Said, *, on_gloo: bool) -> Iterator[str]:
    if not shape.experts:
        for name, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
            if size > 1 and not (name == "expert_tensor" and size == layout.tensor):
                yield f"{said(name)}, but the model has no experts; leave it out"
        return
    if layout.tensor > 1 and not layout.sequence:
        yield (
            f"{said('sequence')} with {said('tensor')}: megatron-core trains experts under tensor parallelism"
            " with sequence parallelism only; leave parallel.sequence out"
        )
    if layout.tensor > 1 and layout.expert == 1 and layout.expert_tensor != layout.tensor:
        other = f", or expert = {layout.tensor}" if shape.experts % layout.tensor == 0 else ""
        yield (
            f"{said('expert_tensor')} with {said('tensor')} and expert = 1: megatron-core 0.16 then gives experts"
            " silently wrong gradients (it sums them over the wrong ranks);"
            f" write expert_tensor = {layout.tensor}{other}"
        )
    if shape.biased_experts and not on_gloo and layout.expert_tensor > 1:
        yield (
            f"{said('expert_tensor')}, and the model's experts have biases: transformer-engine's layers would add a"
            " bias once on each of these ranks; write expert_tensor = 1, and an expert axis above 1"
        )
    if on_gloo and layout.expert > 1 and layout.expert_tensor > 1:
        yield (
            f"{said('expert_tensor')} with {said('expert')}: the exchange needs all-gathers of uneven sizes, which gloo"
            " (ranks without a GPU) cannot do; write expert_tensor = 1 or expert = 1"
        )


def _attention(layout: Layout, shape: Shape, said: Said, *, on_gloo: bool) -> Iterator[str]:
    if shape.sinks and not on_gloo and layout.context > 1:
        yield (
            f"{said('context')}, and the model's attention has sinks: transformer-engine takes them only where it"
            " exchanges heads (cp_comm_type a2a), which was not tried; write context = 1"
        )


def _pipeline(layout: Layout, shape: Shape, said: Said) -> Iterator[str]:
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        yield f"{said('virtual_pipeline')} needs a pipeline; set parallel.pipeline above 1, or leave it out"
    chunks = layout.pipeline * layout.virtual_pipeline
    if shape.layers % chunks and not layout.is_uneven:
        fitting = _divisors(shape.layers, chunks)
        yield (
            f"{said('pipeline')} times {said('virtual_pipeline')} is {chunks} and does not divide the model's"
            f" {shape.layers} layers; make the product {fitting}, or give the first or last stage a number of its"
            f" own: model.megatron.{FIRST}, model.megatron.{LAST}"
        )
    if layout.sequence and layout.tensor == 1:
        yield f"{said('sequence')} shares activations over the tensor axis, which has one rank; leave it out"


def _uneven(loaded: Loaded[Run], layout: Layout, shape: Shape) -> Iterator[str]:
    given = [name for name in (FIRST, LAST) if name in loaded.run.model.megatron]
    if not given:
        return
    said = ", ".join(
        f"model.megatron.{name} = {loaded.run.model.megatron[name]!r} ({loaded.origin(f'model.megatron.{name}')})"
        for name in given
    )
    if any(_count(loaded.run.model.megatron[name]) is None for name in given):
        yield f"{said}: a number of layers is a whole number above 0"
    elif layout.pipeline < len(given) or layout.pipeline == 1:
        yield f"{said} needs a pipeline of stages; set parallel.pipeline above 1, or leave it out"
    elif layout.virtual_pipeline > 1:
        yield f"{said} with parallel.virtual_pipeline = {layout.virtual_pipeline} was never tried; leave one out"
    elif sum(layout.stage_sizes(shape.layers)) != shape.layers or 0 in layout.stage_sizes(shape.layers):
        left, between = shape.layers - sum(_ends(layout)), layout.pipeline - len(_ends(layout))
        yield (
            f"{said}: {left} of the model's {shape.layers} layers are left for the {between} other pipeline stages,"
            " which need equally many, one or more; change these numbers or parallel.pipeline"
        )


def _ends(layout: Layout) -> list[int]:
    return _given(layout.first_layers) + _given(layout.last_layers)


def _given(count: int | None) -> list[int]:
    return [] if count is None else [count]


def _divisors(total: int, near: int) -> str:
    """Return the divisors of ``total`` on both sides of ``near``, as words."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    below = [size for size in divisors if size < near][-1:]
    above = [size for size in divisors if size > near][:1]
    return " or ".join(map(str, below + above))


def _multiples(near: int, of: int) -> str:
    below = near // of * of
    return " or ".join(str(size) for size in (below, below + of) if size)
