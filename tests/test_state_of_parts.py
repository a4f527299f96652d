"""``policy_loss`` on parts of a mini-batch with a loss that adapts numbers: they are those of the whole."""

from collections import Counter
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import megatron_rl
from megatron_rl.api import Option, PolicyLoss
from megatron_rl.errors import ConfigError

ROWS, WIDTH = 7, 5
SPLITS = ([[0, 1], [2], [3, 4, 5], [6]], [[0, 2, 4, 6], [1, 3, 5]])
OPTIONS: Mapping[str, dict[str, Option]] = {
    "r2vpo": {"name": "r2vpo", "eta": 3.0},
    "r2vpo by responses": {"name": "r2vpo", "eta": 3.0, "aggregation": "sequence"},
    "entropy": {"name": "grpo", "entropy": {"target_fraction": 1.02}},
    "both": {"name": "r2vpo", "eta": 3.0, "entropy": {"target": 0.5}},
}


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)

    def values(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([5, 3, 4, 5, 2, 5, 3])
    old = -values(ROWS, WIDTH)
    return {
        "logprobs": (old + 0.5 * values(ROWS, WIDTH)).requires_grad_(),
        "old_logprobs": old,
        "advantages": values(ROWS) - 0.5,
        "loss_mask": torch.arange(WIDTH) < lengths[:, None],
        "current_entropies": values(ROWS, WIDTH),
    }


def loss_of(
    options: dict[str, Option],
    inputs: dict[str, Tensor],
    rows: list[int],
    totals: megatron_rl.Totals | Callable[[Tensor], Tensor] | None,
    state: Mapping[str, float] | None,
) -> PolicyLoss:
    parts = {name: tensor[rows] for name, tensor in inputs.items()}
    return megatron_rl.policy_loss(options, **parts, vocab_size=None, totals=totals, state=state)


@pytest.mark.parametrize("split", SPLITS, ids=["micro-batches", "ranks"])
@pytest.mark.parametrize("name", OPTIONS)
def test_added_sums_adapt_the_numbers_as_the_whole_mini_batch(name: str, split: list[list[int]]) -> None:
    """Over three optimizer steps, each with the numbers of the one before."""
    options = OPTIONS[name]
    whole: dict[str, float] | None = None
    state: dict[str, float] | None = None
    for step in range(3):
        inputs = tensors(step)
        expected = loss_of(options, inputs, list(range(ROWS)), None, whole)
        parts = [loss_of(options, inputs, rows, megatron_rl.Totals(ROWS, 27), state) for rows in split]
        assert sum(part.loss.item() for part in parts) == pytest.approx(expected.loss.item(), abs=1e-14)
        assert len({tuple(part.state.items()) for part in parts}) == 1  # the counts of a mini-batch adapt nothing
        sums = Counter[str]()
        for part in parts:
            sums.update(part.sums)
        before, state = state, megatron_rl.next_state(options, sums=sums, state=state)
        whole = expected.state
        assert state == pytest.approx(whole, rel=1e-13)
        assert state != before
    assert state is not None


@pytest.mark.parametrize("name", OPTIONS)
def test_a_function_that_adds_over_parts_adapts_every_part_alike(name: str) -> None:
    options, inputs = OPTIONS[name], tensors(0)
    summands: list[list[Tensor]] = []
    for rows in SPLITS[1]:
        summands.append([])
        loss_of(options, inputs, rows, lambda values: summands[-1].append(values) or values, None)
    sums = [first + second for first, second in zip(*summands, strict=True)]
    expected = loss_of(options, inputs, list(range(ROWS)), None, None).state
    assert expected
    for rows in SPLITS[1]:
        given = iter(sums[:1])
        # The second sum is that of the metrics, which depend on the denominators of the first.
        metrics = loss_of(options, inputs, SPLITS[1][0], megatron_rl.Totals(ROWS, 27), None).sums
        other = loss_of(options, inputs, SPLITS[1][1], megatron_rl.Totals(ROWS, 27), None).sums
        added = torch.tensor([metrics[key] + other[key] for key in metrics], dtype=torch.float64)
        found = loss_of(options, inputs, rows, lambda _, given=given, added=added: next(given, added), None)
        assert found.state == pytest.approx(expected, rel=1e-13)


def test_sums_of_another_loss_are_named() -> None:
    result = loss_of({"name": "grpo"}, tensors(0), [0, 1], None, None)
    assert megatron_rl.next_state("grpo", sums=result.sums) == result.state == {}
    with pytest.raises(ConfigError, match="needs the sum 'objective/ratio_variance'"):
        megatron_rl.next_state("r2vpo", sums=result.sums)
