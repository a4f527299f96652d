"""The families and layouts in which transformer-engine's layer spec is tested."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.policy.families import MIXTURES, MODELS


@dataclass(frozen=True)
class Layout:
    """A layout of ranks and the settings that change what its layers run.

    Attributes:
        ranks: number of ranks.
        parallel: the parallel section.
        model: the model section.
        accumulates: whether products add weight gradients to the main gradients, as with apex's extension.
        experts_only: whether dense models do not have it.
    """

    ranks: int = 1
    parallel: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
    accumulates: bool = False
    experts_only: bool = False

    @property
    def dtype(self) -> str:
        """The model's dtype."""
        return str(self.model.get("dtype", "float32"))


BASIC: Mapping[str, Layout] = {
    "one rank": Layout(),
    "unfused attention": Layout(model={"megatron": {"attention_backend": "unfused"}}),
    "tensor=2": Layout(2, {"tensor": 2}),
    "expert=2": Layout(2, {"expert": 2}, experts_only=True),
    "tensor=2,expert=2": Layout(2, {"tensor": 2, "expert": 2}, experts_only=True),
    "pipeline=2": Layout(2, {"pipeline": 2}),
    "context=2": Layout(2, {"context": 2}),
    "bfloat16": Layout(model={"dtype": "bfloat16"}),
}
"""Layouts of every family."""
MORE: Mapping[str, Layout] = {
    "tensor=2,expert=4": Layout(4, {"tensor": 2, "expert": 4}),
    "tensor=2,pipeline=2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "pipeline=2,context=2": Layout(4, {"pipeline": 2, "context": 2}),
    "tensor=2,context=2": Layout(4, {"tensor": 2, "context": 2}),
    "expert=2,context=2,data=2": Layout(4, {"context": 2, "expert": 2}),
    "context=4": Layout(4, {"context": 4}),
    "recompute=full": Layout(2, {"tensor": 2}, {"recompute": "full"}),
    "recompute=selective": Layout(2, {"context": 2}, {"recompute": "selective"}),
    "apex": Layout(2, {"pipeline": 2}, accumulates=True),
    "apex,bfloat16": Layout(2, {"tensor": 2}, {"dtype": "bfloat16"}, accumulates=True),
    "bfloat16,tensor=2,context=2": Layout(4, {"tensor": 2, "context": 2}, {"dtype": "bfloat16"}),
}
"""Layouts of ``MORE_FAMILIES``."""
DENSE: Mapping[str, Layout] = {"tensor=2,sequence=false": Layout(2, {"tensor": 2, "sequence": False})}
"""Layouts of dense families only: experts need sequence parallelism under tensor parallelism."""
BUILT: Mapping[str, Layout] = {
    "tensor=2,expert_tensor=2": Layout(2, {"tensor": 2, "expert_tensor": 2}, experts_only=True),
    "tensor=2,expert=2,expert_tensor=2": Layout(4, {"tensor": 2, "expert": 2, "expert_tensor": 2}, experts_only=True),
    "tensor=2,expert=2,pipeline=2": Layout(4, {"tensor": 2, "expert": 2, "pipeline": 2}, experts_only=True),
}
"""Layouts that are built but not run: gloo cannot exchange tokens between experts that are tensor-parallel."""
LAYOUTS: Mapping[str, Layout] = {**BASIC, **MORE, **DENSE, **BUILT}
MORE_FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss")
BIASED_EXPERTS = {"gpt_oss"}
"""Families whose experts have biases: transformer-engine's layers do not support more than one rank per expert."""


def layouts_of(name: str) -> list[str]:
    """Return the layouts in which a family is tested."""
    layouts = [layout for layout, about in BASIC.items() if name in MIXTURES or not about.experts_only]
    layouts += MORE if name in MORE_FAMILIES else []
    # Two key heads are shared out over tensor and then over context ranks: the exchange needs one head for each.
    unfit = {"context=4", "tensor=2,context=2", "bfloat16,tensor=2,context=2"} if name == "gpt_oss" else set()
    return [layout for layout in layouts if layout not in unfit] + ([] if name in MIXTURES else [*DENSE])


CASES = [pytest.param(name, layout, id=f"{name}-{layout}") for name in MODELS for layout in layouts_of(name)]
BUILT_CASES = [
    *CASES,
    *(
        pytest.param(name, each, id=f"{name}-{each}")
        for name in MIXTURES
        if name not in BIASED_EXPERTS
        for each in BUILT
    ),
]


def parallel_of(name: str, layout: str) -> dict[str, object]:
    """Return the parallel section, with whole experts on each rank where the family needs it."""
    return {**LAYOUTS[layout].parallel, **({"expert_tensor": 1} if name in BIASED_EXPERTS else {})}
