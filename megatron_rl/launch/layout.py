"""Sizes of the mesh axes as they come out, and everything that can be wrong with them before a process starts."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_rl.config.load import Loaded
from megatron_rl.config.schema import Parallel, Run
from megatron_rl.launch.shape import Shape

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

    @property
    def data(self) -> int:
        """Copies of the dense weights that see different sequences."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


def layout_of(parallel: Parallel, ranks: int | None = None) -> Layout:
    """Return the axes; without ``ranks`` as many ranks as the config asks for, or the fewest that its sizes allow."""
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
    )


def check_layout(loaded: Loaded[Run], layout: Layout, shape: Shape, *, on_gloo: bool) -> list[str]:
    """Return all that is wrong with a layout, one sentence a problem: numbers, where they were set, what to write."""

    def said(name: str) -> str:
        key = f"parallel.{name}"
        return f"{key} = {getattr(layout, name)} ({loaded.origin(key)})"

    return [
        *_ranks(layout, said("ranks") if loaded.run.parallel.ranks == layout.ranks else f"{layout.ranks} ranks"),
        *_divisions(layout, shape, said),
        *_experts(layout, shape, said, on_gloo=on_gloo),
        *_pipeline(layout, shape, said),
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
    if on_gloo and layout.expert > 1 and layout.expert_tensor > 1:
        yield (
            f"{said('expert_tensor')} with {said('expert')}: the exchange needs all-gathers of uneven sizes, which gloo"
            " (ranks without a GPU) cannot do; write expert_tensor = 1 or expert = 1"
        )


def _pipeline(layout: Layout, shape: Shape, said: Said) -> Iterator[str]:
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        yield f"{said('virtual_pipeline')} needs a pipeline; set parallel.pipeline above 1, or leave it out"
    chunks = layout.pipeline * layout.virtual_pipeline
    if shape.layers % chunks:
        fitting = _divisors(shape.layers, chunks)
        yield (
            f"{said('pipeline')} times {said('virtual_pipeline')} is {chunks} and does not divide the model's"
            f" {shape.layers} layers; make the product {fitting}"
        )
    if layout.sequence and layout.tensor == 1:
        yield f"{said('sequence')} shares activations over the tensor axis, which has one rank; leave it out"


def _divisors(total: int, near: int) -> str:
    """Return the divisors of ``total`` on both sides of ``near``, as words."""
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    below = [size for size in divisors if size < near][-1:]
    above = [size for size in divisors if size > near][:1]
    return " or ".join(map(str, below + above))


def _multiples(near: int, of: int) -> str:
    below = near // of * of
    return " or ".join(str(size) for size in (below, below + of) if size)
