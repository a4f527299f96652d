"""Our losses against what trl and verl gave for the same log-probs; `benchmarks/peer_losses.py` recorded it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megatron_rl
from megatron_rl.api import Option

RECORDED = Path(__file__).with_name("losses.safetensors")
CASES: Mapping[str, Mapping[str, Option]] = {
    "grpo": {"name": "grpo"},
    "dapo": {"name": "grpo", "clip_high": 0.28, "aggregation": "token"},
    "gspo": {"name": "gspo"},
    "sapo": {"name": "sapo"},
    "cispo": {"name": "cispo", "clip_high": 0.3},
}
PEERS, BATCHES = ("trl", "verl"), range(5)
BOUNDS = {"trl": 1e-12, "verl": 2e-8, ("trl", "sapo"): 1e-7}
"""In float64, of terms of order 1: rounding; verl divides by the number of tokens + 1e-8; trl keeps SAPO's temperature
1.05 in float32."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED)


def ours(recorded: Mapping[str, torch.Tensor], case: str, batch: int, dtype: torch.dtype):
    """Return (loss, gradient to the log-probs)."""
    logprobs, old_logprobs, advantages = (
        recorded[f"batch/{batch}/{name}"].to(dtype, copy=True) for name in ("logprobs", "old_logprobs", "advantages")
    )
    logprobs.requires_grad_()
    loss = megatron_rl.policy_loss(
        CASES[case],
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        loss_mask=recorded[f"batch/{batch}/mask"],
    ).loss
    loss.backward()
    return loss.detach(), logprobs.grad


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_peers(recorded, peer: str, case: str) -> None:
    for batch in BATCHES:
        loss, _ = ours(recorded, case, batch, torch.float32)
        # A sum of a hundred terms of order 1, each rounded to 6e-8, in another order.
        torch.testing.assert_close(loss, recorded[f"{peer}/{case}/{batch}/float32"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_peers(recorded, peer: str, case: str) -> None:
    for batch in BATCHES:
        loss, gradient = ours(recorded, case, batch, torch.float64)
        bound = BOUNDS.get((peer, case), BOUNDS[peer])
        torch.testing.assert_close(loss, recorded[f"{peer}/{case}/{batch}/float64"], rtol=1e-12, atol=bound)
        torch.testing.assert_close(gradient, recorded[f"{peer}/{case}/{batch}/gradient"], rtol=1e-12, atol=bound)


def test_the_recorded_batches_are_told_apart(recorded) -> None:
    """A fixture in which clipping or the length of responses makes no difference would show nothing."""
    losses = torch.stack([recorded[f"trl/{case}/4/float64"] for case in CASES])

    assert len(losses.unique()) == len(CASES)
    assert len({int(count) for count in recorded["batch/4/mask"].sum(1)}) > 2
