"""Our losses against what trl and verl gave for the same log-probs; `benchmarks/peer_losses.py` recorded it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import megatron_rl
from megatron_rl.api import Option

RECORDED = Path(__file__).with_name("losses.safetensors")
BATCHES = range(5)
LONGEST = 24
"""Padded length of the recorded batches."""
KL_COV: Mapping[str, Option] = {"kind": "kl", "fraction": 0.2}


@dataclass(frozen=True)
class Case:
    """A recorded loss and our options for it.

    Attributes:
        options: objective of ``policy_loss``.
        old: column that takes the place of the old log-probs, as in the recording.
        bound: largest difference in float64, of terms of order 1.
        has_value: the values are equal too, not only the gradients.
        batches: recorded batches in which the definitions coincide.
    """

    options: Mapping[str, Option]
    old: str = "old_logprobs"
    bound: float = 1e-12
    has_value: bool = True
    batches: range = BATCHES


def grpo(**options: Option) -> Case:
    return Case({"name": "grpo", **options})


def verl(case: Case) -> Case:
    """A mean over responses divides by the number of tokens + 1e-8 in verl."""
    return replace(case, bound=2e-8)


def corrected(**correction: object) -> Case:
    return grpo(aggregation="token", correction=correction)


def reference(estimator: str) -> Case:
    return Case({"name": "reinforce", "kl": {"coefficient": 0.1, "estimator": estimator}})


GEOMETRIC: Mapping[str, object] = {"geometric": {"low": 1 / 1.1, "high": 1 / 0.9}}
"""verl's bounds are on the rollout engine's probability over the trainer's."""
TRL = {
    "grpo": grpo(),
    "grpo two-sided": grpo(dual_clip=1.5),
    "grpo opsm": grpo(correction={"opsm_delta": 0.05}),
    "grpo opsm engine": grpo(correction={"opsm_delta": 0.05, "opsm_anchor": "rollout"}),
    "grpo top entropy": grpo(top_entropy_fraction=0.2, top_entropy_scope="batch"),
    "grpo k3": grpo(kl={"coefficient": 0.1}),
    "grpo unbiased": grpo(kl={"coefficient": 0.1, "unbiased": True}),
    "bnpo": grpo(aggregation="token"),
    "dr grpo": grpo(aggregation="constant", normalizer=LONGEST),
    "dapo": grpo(clip_high=0.28, aggregation="token"),
    "dapo entropy bonus": grpo(clip_high=0.28, aggregation="token", entropy={"coefficient": 0.05}),
    "gspo": Case({"name": "gspo"}),
    "luspo": Case({"name": "gspo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sum"}),
    "sapo": Case({"name": "sapo"}, bound=1e-7),  # the temperature 1.05 stays float32
    "cispo": Case({"name": "cispo", "clip_high": 0.3}),
    "vespo": Case({"name": "vespo"}),
}
VERL = {
    "grpo": verl(grpo()),
    "grpo sum": grpo(aggregation="sum"),
    "grpo dual clip": verl(grpo(dual_clip=1.5)),
    "dr grpo": grpo(aggregation="constant", normalizer=LONGEST),
    "dapo": grpo(clip_high=0.28, aggregation="token"),
    "gspo": verl(Case({"name": "gspo"})),
    "gspo token": Case({"name": "gspo", "aggregation": "token"}),
    "luspo": Case({"name": "gspo", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sum"}),
    "sapo": verl(Case({"name": "sapo"})),
    "cispo": Case({"name": "cispo", "clip_high": 0.3}),
    "gmpo": verl(Case({"name": "gmpo"})),
    "reinforce": Case({"name": "reinforce"}),
    "dro": Case({"name": "dro"}),
    "dppo tv": Case({"name": "dppo"}, "rollout_logprobs"),
    "dppo kl": Case({"name": "dppo", "divergence": "kl"}, "rollout_logprobs"),
    "clip-cov": Case(
        {
            "name": "grpo",
            "aggregation": "token",
            "covariance": {"kind": "clip", "fraction": 1.0, "low": 0.05, "high": 0.5},
        },
        "logprobs",
    ),
    # verl ranks by the current log-probs and clips nothing: equal where the order is and nothing is clipped.
    "kl-cov": Case({"name": "grpo", "aggregation": "token", "covariance": KL_COV}, batches=range(2)),
    "tis token": corrected(kind="tis"),
    "tis response": corrected(kind="tis", level="sequence"),
    "icepop": corrected(kind="icepop", low=0.5, high=2),
    "geometric gate": corrected(gates=GEOMETRIC),
    "geometric gate, tis": corrected(kind="tis", gates=GEOMETRIC),
    "product gate": corrected(gates={"product": {"reduction": "product", "low": 0.5, "high": 2}}),
    "token gate": corrected(gates={"token": {"level": "token", "low": 1 / 1.4, "high": 1 / 0.8}}),
    "k3 gate of tokens": corrected(gates={"token": {"level": "token", "measure": "k3", "high": 0.05}}),
    "k3 gate of means": corrected(gates={"mean": {"measure": "k3", "high": 0.05}}),
    "k3 gate of maxima": corrected(gates={"max": {"measure": "k3", "reduction": "max", "high": 0.2}}),
    "bypass": grpo(anchor="rollout", aggregation="token"),
    "bypass tis": Case({"name": "cispo", "anchor": "rollout", "clip_high": 1}),
    "bypass icepop": Case({"name": "dis"}, has_value=False),
    "bypass geometric gate": grpo(
        anchor="rollout",
        aggregation="token",
        correction={"gates": {"it": {"policy": "current", "low": 1 / 1.1, "high": 1 / 0.9}}},
    ),
    "k1": reference("k1"),
    "k2": reference("k2"),
    "k3": replace(reference("k3"), batches=range(4)),  # verl bounds k3 by 10 per token
    "abs": reference("abs"),
}
CASES = {f"trl/{name}": case for name, case in TRL.items()} | {f"verl/{name}": case for name, case in VERL.items()}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


def ours(recorded: Mapping[str, Tensor], case: Case, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient to the log-probs of the trained tokens)."""
    names = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropies", "advantages")
    columns = {name: recorded[f"batch/{batch}/{name}"].to(dtype, copy=True) for name in names}
    logprobs = columns["logprobs"].requires_grad_()
    mask = recorded[f"batch/{batch}/mask"]
    loss = megatron_rl.policy_loss(
        case.options,
        logprobs=logprobs,
        loss_mask=mask,
        old_logprobs=columns[case.old].detach(),
        rollout_logprobs=columns["rollout_logprobs"],
        ref_logprobs=columns["ref_logprobs"],
        advantages=columns["advantages"],
        entropies=columns["entropies"],
        current_entropies=columns["entropies"],
    ).loss
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad[mask]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_value])
def test_losses_are_those_of_the_peers(recorded, name: str) -> None:
    for batch in CASES[name].batches:
        loss, _ = ours(recorded, CASES[name], batch, torch.float32)
        # A sum of a hundred terms of order 1, each rounded to 6e-8, in another order.
        torch.testing.assert_close(loss, recorded[f"{name}/{batch}/float32"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_peers(recorded, name: str) -> None:
    case = CASES[name]
    for batch in case.batches:
        loss, gradient = ours(recorded, case, batch, torch.float64)
        torch.testing.assert_close(gradient, recorded[f"{name}/{batch}/gradient"], rtol=1e-12, atol=case.bound)
        if case.has_value:
            torch.testing.assert_close(loss, recorded[f"{name}/{batch}/float64"], rtol=1e-12, atol=case.bound)


def test_every_recorded_loss_is_compared(recorded) -> None:
    assert {name.rsplit("/", 2)[0] for name in recorded if not name.startswith("batch/")} == set(CASES)


@pytest.mark.parametrize("peer", ["trl", "verl"])
def test_the_recorded_losses_are_told_apart(recorded, peer: str) -> None:
    """A fixture in which clipping, a gate or the length of responses makes no difference would show nothing."""
    names = [name for name in CASES if name.startswith(f"{peer}/")]
    found = {
        name: torch.cat(
            [recorded[f"{name}/{batch}/{key}"].view(-1) for batch in BATCHES for key in ("float64", "gradient")]
        )
        for name in names
    }
    alike = [pair for pair in combinations(names, 2) if torch.allclose(*(found[name] for name in pair), rtol=1e-6)]
    assert alike == []
    assert len({int(count) for count in recorded["batch/4/mask"].sum(1)}) > 2
