"""The comparison of a layout's results with the reference, as ``megatron-rl prove`` makes it."""

import math

import torch
from torch import Tensor

from megatron_rl.prove.compare import TOLERANCES, Differences, differences

METRICS = ("loss", "grad_norm", "ratio_mean", "ratio_max", "tokens", "clipped_fraction")
METRICS += ("gradient_fraction", "segments_mean")


def results(**changes: Tensor) -> dict[str, Tensor]:
    """Return results of one objective with two parameters, as ``prove.rank`` writes them."""
    metrics = {f"grpo/metric.{name}": torch.tensor(1.0, dtype=torch.float64) for name in METRICS}
    gradients = {f"grpo/gradient.{name}": torch.tensor([3.0, 4.0], dtype=torch.float64) for name in ("a", "b")}
    scores = {name: torch.tensor([-1.0, -30.0], dtype=torch.float64) for name in ("logprobs_T", "entropies_T")}
    return {**metrics, **gradients, **scores, **changes}


def compare(**changes: Tensor) -> Differences:
    return differences(results(**changes), results(), "grpo", TOLERANCES["float64"])


def test_equal_results_pass():
    assert compare().passed
    assert compare().record()["holds"] is True


def test_differences_are_relative_to_the_reference():
    found = compare(**{"grpo/gradient.b": torch.tensor([3.0, 4.5]), "logprobs_T": torch.tensor([-1.0, -33.0])})
    assert (found.worst, found.gradient) == ("b", 0.1)
    assert found.logprobs == 0.1
    assert len(found.reasons) == 2


def test_a_difference_that_is_nan_fails():
    nan = torch.tensor(math.nan)
    assert not compare(**{"grpo/metric.loss": nan}).passed
    assert not compare(**{"grpo/gradient.a": torch.stack([nan, nan])}).passed


def test_a_missing_gradient_fails():
    ours = results()
    del ours["grpo/gradient.a"]
    found = differences(ours, results(), "grpo", TOLERANCES["float64"])
    assert found.reasons == ("gradient of a in one of the two only",)
