"""Grouped experts against megatron's loop over experts: values, gradients, and that no weight is copied."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_rl.data.pack import pack
from megatron_rl.data.types import Batch
from megatron_rl.parallel.mesh import start_world
from megatron_rl.policy import layers
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.experts import GroupedExperts, Matrices, grouped_linear, grouped_product, strided
from tests.policy.test_parity import LAYOUTS, one_step, weighted
from tests.policy.tiny import case, run_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def by_loop(
    folder: str, parallel: dict[str, object], model: dict[str, object], batch: Batch
) -> dict[str, Tensor] | None:
    """One step as ``one_step``, in a process of its own, with megatron's loop over experts."""
    layers.can_group = lambda config: False
    return one_step(folder, parallel, model, batch)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("one rank", "float32"), ("one rank", "bfloat16"), ("tensor and expert", "float32")],
)
def test_grouped_experts_give_what_the_loop_gives(model: Path, layout: str, dtype: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    arguments = (str(model), parallel, {"dtype": dtype}, case())
    grouped, looped = (
        run_ranks(how, ranks, *arguments, initialise=False, timeout_seconds=280)[0] for how in (one_step, by_loop)
    )
    assert grouped is not None
    assert looped is not None
    assert grouped.keys() == looped.keys()
    # The same products in the same order; only the sums over a row's tokens may come out otherwise.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-1}[dtype]
    for name, tensor in looped.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        torch.testing.assert_close(grouped[name], tensor, atol=tolerance * scale, rtol=0, msg=name)


def views(folder: str) -> dict[str, bool]:
    """Return which kinds of the experts' memory can be read and written without a copy, after a backward pass."""
    run = run_of(Path(folder), parallel={"distributed_optimizer": True})
    policy = Policy(run, start_world(60, deterministic=True), total_updates=1)
    rows = pack(case(), policy.row_rules)
    policy.accumulate(rows, weighted)
    modules = [m for m in policy.chunks[0].modules() if isinstance(m, GroupedExperts)]
    assert not [m for m in policy.chunks[0].modules() if isinstance(m, SequentialMLP)]
    matrices = [side.weights for module in modules for side in module.matrices]
    gradients = [strided([getattr(weight, "main_grad") for weight in weights]) for weights in matrices]  # noqa: B009
    return {
        "some": len(matrices) == 6,
        "weights": all(strided(weights) is not None for weights in matrices),
        "gradients": all(view is not None and bool(view.abs().sum() > 0) for view in gradients),
    }


def test_weights_and_gradients_are_views_in_megatron_s_buffers(model: Path) -> None:
    found = run_ranks(views, 1, str(model), initialise=False)[0]
    assert found == dict.fromkeys(found, True)


def test_matrices_at_uneven_distances_are_stacked() -> None:
    memory = torch.arange(60.0).view(10, 6)
    even, uneven = [memory[n] for n in (0, 3, 6)], [memory[n] for n in (0, 3, 7)]
    descending, apart = [memory[n] for n in (6, 3, 0)], [memory[0], memory[3].clone(), memory[6]]
    assert strided(even) is not None
    for matrices in (uneven, descending, apart):
        assert strided(matrices) is None
    for matrices in (even, uneven, descending, apart):
        weights = Matrices([torch.nn.Parameter(matrix) for matrix in matrices])
        assert torch.equal(weights.read(), torch.stack(matrices))


@pytest.mark.parametrize("inputs", [16, 7], ids=["kernel", "loop"])
@pytest.mark.parametrize("together", [True, False], ids=["one memory", "stacked"])
def test_grouped_linear_has_the_gradients_of_separate_products(inputs: int, together: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1])  # one expert without a token
    memory = torch.randn(4, 8, inputs, generator=generator)
    own = [matrix if together else matrix.clone() for matrix in memory]
    weights = [torch.nn.Parameter(matrix) for matrix in own]
    tokens_TI = torch.randn(9, inputs, generator=generator, requires_grad=True)
    out_TO = grouped_linear(tokens_TI, counts.cumsum(0).int(), Matrices(weights))
    upstream_TO = torch.randn(out_TO.shape, generator=generator)
    found = torch.autograd.grad(out_TO, [tokens_TI, *weights], upstream_TO)

    parts = [part @ weight.T for part, weight in zip(tokens_TI.split(counts.tolist()), weights, strict=True)]
    expected = torch.autograd.grad(torch.cat(parts), [tokens_TI, *weights], upstream_TO)
    torch.testing.assert_close(out_TO, torch.cat(parts))
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_groups_without_any_token_give_zeros() -> None:
    nothing = torch.zeros(0, 8)
    ends_E = torch.zeros(3, dtype=torch.int32)
    assert grouped_product(nothing, torch.randn(3, 8, 4), ends_E).shape == (0, 4)
    assert torch.equal(grouped_product(nothing.T, torch.zeros(0, 4), ends_E), torch.zeros(3, 8, 4))
