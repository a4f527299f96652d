"""The layouts in which transformer-engine's layer spec is tested."""

import pytest

from tests.policy.families import MIXTURES, MODELS

Layout = tuple[int, dict[str, object]]
LAYOUTS: dict[str, Layout] = {
    "one rank": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "expert": (2, {"expert": 2}),
    "tensor and expert": (2, {"tensor": 2, "expert": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "context": (2, {"context": 2}),
}
"""Name -> (number of ranks, parallel section)."""
BIASED_EXPERTS = {"gpt_oss"}
"""Families whose experts have biases: transformer-engine's layers do not support more than one rank per expert."""
CASES = [
    pytest.param(name, layout, id=f"{name}-{layout}")
    for name in MODELS
    for layout in LAYOUTS
    if "expert" not in layout or name in MIXTURES
]


def parallel_of(name: str, layout: str) -> Layout:
    """Return the number of ranks and the layout, with whole experts on each rank where the family needs it."""
    ranks, parallel = LAYOUTS[layout]
    return ranks, {**parallel, "expert_tensor": 1} if name in BIASED_EXPERTS else parallel
