"""No step of the loss waits for the device: run on tensors without values, any look at a value is an error."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from megatron_rl.algorithms.correction import Correction
from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.ops.head import Backend, head_logprobs_entropies
from tests.test_loss import OBJECTIVES, VOCABULARY, batch_of


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_and_its_gradient_look_at_no_value(name):
    batch, logprobs_T = batch_of([9, 4, 12, 7, 5])
    prepared = batch.add(prepare(batch, OBJECTIVES[name], Correction(kind="tis"), VOCABULARY))
    inputs = LossInputs.gather(prepared)
    loss = make_loss(OBJECTIVES[name], ReferenceKL(coefficient=0.1))
    new_R = logprobs_T[batch.trained_R]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        logprobs_R = mode.from_tensor(new_R).requires_grad_()
        entropies_R = mode.from_tensor(new_R).requires_grad_()
        found = loss(logprobs_R, entropies_R, inputs.map(mode.from_tensor))
        found.value.backward()
        assert logprobs_R.grad is not None
        finite = logprobs_R.isfinite().all() & found.value.isfinite()  # as the policy asks, and reads later
    assert finite.shape == ()


@pytest.mark.parametrize("backend", ["plain", "tiles"])
def test_the_vocabulary_operation_looks_at_no_value(backend: Backend):
    with FakeTensorMode(allow_non_fake_inputs=False):
        hidden_RH = torch.randn(6, 8, requires_grad=True)
        weight_VH = torch.randn(40, 8, requires_grad=True)
        targets_R = torch.randint(0, 40, (6,))
        logprobs_R, entropies_R = head_logprobs_entropies(hidden_RH, weight_VH, targets_R, backend=backend)
        (logprobs_R.sum() + entropies_R.sum()).backward()
        assert hidden_RH.grad is not None


def waiting(tensor: Tensor) -> object:
    return tensor[tensor > 0].sum()


@pytest.mark.parametrize("look", [float, bool, waiting, Tensor.item, Tensor.nonzero])
def test_such_a_look_would_be_seen(look):
    with (
        FakeTensorMode(allow_non_fake_inputs=False),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        look(torch.ones(1))
