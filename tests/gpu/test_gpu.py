"""Tests on a GPU: every path of a layer agrees with the plain one, nothing synchronizes, equal steps have equal bits.

Run with `pytest -m gpu`. With MEGATRON_RL_REHEARSE=1 they run on a CPU, which only tests the tests. docs/gpu.md says
whether they have run on a GPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.kl import ReferenceKL
from megatron_rl.algorithms.loss import make_loss, prepare
from megatron_rl.algorithms.objectives import ESPO
from megatron_rl.data.loss_inputs import LossInputs
from megatron_rl.distributed.mesh import make_deterministic, single_rank_world
from megatron_rl.ops.head import Backend, head_logprobs_entropies
from megatron_rl.policy.attention import varlen_attention
from megatron_rl.policy.backends import PLAIN_VARIABLE
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.experts import grouped_product, strided
from megatron_rl.policy.process_groups import destroy_mesh
from megatron_rl.policy.rows import PackedRow
from tests.policy.plain_attention import causal
from tests.policy.test_parity import weighted
from tests.policy.tiny import case, run_of, save_model
from tests.test_loss import VOCABULARY, batch_of

REHEARSAL = os.environ.get("MEGATRON_RL_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="torch sees no CUDA device"),
]
gpu_only = pytest.mark.skipif(REHEARSAL, reason="needs a GPU kernel")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_mesh_stays() -> Iterator[None]:
    yield
    destroy_mesh()
    make_deterministic(False, torch.device("cpu"))


def step(folder: Path, dtype: str, *, deterministic: bool = False) -> dict[str, Tensor]:
    """Return log-probs, gradients and updated weights of one step on the GPU."""
    world = single_rank_world()
    make_deterministic(deterministic, world.device)
    policy = Policy(run_of(folder, model={"dtype": dtype}), world, total_updates=1)
    batch = policy.local_part(case())
    scored = policy.compute_logprobs(batch)
    policy.forward_backward(batch, weighted, whole_gradients=True)
    gradients = {name: tensor.clone().float() for name, tensor in policy.gradients()}
    policy.optim_step()
    weights = {f"after.{name}": tensor.clone().float() for name, tensor in policy.weights(1 << 20)}
    destroy_mesh()
    return {"logprobs_T": scored.logprobs_T, **gradients, **weights}


def distance(found: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of each difference, relative to the norm of the plain result."""
    return {name: float((found[name] - tensor).norm() / (tensor.norm() + 1e-6)) for name, tensor in plain.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plain", ["engine", "engine,attention", "engine,experts", "engine,fusion", ""])
def test_every_path_agrees_with_the_plain_one(model: Path, dtype: str, plain: str, monkeypatch) -> None:
    monkeypatch.setenv(PLAIN_VARIABLE, "engine,attention,experts,fusion")
    expected = step(model, dtype)
    monkeypatch.setenv(PLAIN_VARIABLE, plain)
    found = distance(step(model, dtype), expected)
    # bfloat16 has 8 bits; rounding differs in every product of four layers, and may turn a router's choice.
    tolerance = 1e-4 if dtype == "float32" else 0.15
    assert {name: value for name, value in found.items() if value > tolerance} == {}


@gpu_only
@pytest.mark.parametrize(("groups", "value_width"), [(4, 64), (2, 64), (4, 48)])
def test_torch_s_variable_length_kernel_is_causal_attention(groups: int, value_width: int) -> None:
    lengths = (5, 1, 130, 64)
    total = sum(lengths)
    torch.manual_seed(0)
    shapes = ((total + 3, 4, 64), (total + 3, groups, 64), (total + 3, groups, value_width))
    query, key, value = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    row = PackedRow(sequence_ends=ends, num_tokens=total, max_seqlen_q=130, max_seqlen_kv=130)
    found = varlen_attention(query, key, value, row, 0.2)
    inputs = [query, key, value]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    parts = [tensor[:total].split(lengths) for tensor in wide]
    expected = torch.cat([causal(q, k, v, 0.2) for q, k, v in zip(*parts, strict=True)])
    # bfloat16 in and out; sums in float32
    torch.testing.assert_close(found[:total].float(), expected, atol=3e-2, rtol=3e-2)
    assert bool((found[total:] == 0).all())
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found[:total], inputs, upstream.bfloat16())
    theirs = torch.autograd.grad(expected, wide, upstream)
    for gradient, other in zip(ours, theirs, strict=True):
        assert float((gradient.float() - other).norm() / other.norm()) < 2e-2


def test_the_grouped_kernel_takes_matrices_at_a_distance() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([70, 0, 30, 28])
    memory = torch.randn(4, 3 * 64 * 128, device=DEVICE, dtype=torch.bfloat16)
    matrices = [row[: 2 * 64 * 128].view(128, 128) for row in memory]
    view = strided(matrices)
    assert view is not None
    tokens = torch.randn(128, 128, device=DEVICE, dtype=torch.bfloat16)
    ends = counts.cumsum(0).int().to(DEVICE)
    found = grouped_product(tokens, view.transpose(1, 2), ends)
    pieces = tokens.split(counts.tolist())
    expected = torch.cat([piece @ matrix.T for piece, matrix in zip(pieces, matrices, strict=True)])
    torch.testing.assert_close(found, expected, atol=0.1, rtol=2e-2)
    gradient = grouped_product(found.T, tokens, ends)
    outs = found.split(counts.tolist())
    expected = torch.stack([out.T @ piece for out, piece in zip(outs, pieces, strict=True)])
    torch.testing.assert_close(gradient, expected, atol=8.0, rtol=3e-2)  # sums of 70 terms of 128


@pytest.mark.parametrize("backend", ["tiles", "tiles+compile", pytest.param("tiles+triton", marks=gpu_only)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vocabulary_operation_on_a_gpu(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device=DEVICE).to(dtype), torch.randn(40_000, 64, device=DEVICE).to(dtype)
    targets = torch.randint(0, 40_000, (300,), device=DEVICE)
    results = []
    for chosen, precision in ((backend, dtype), ("plain", torch.float64)):
        left, right = (matrix.to(precision, copy=True).requires_grad_() for matrix in (hidden, weight))
        values = head_logprobs_entropies(left, right, targets, backend=chosen)
        (values[0].sum() - values[1].sum()).backward()
        results.append([*(value.detach() for value in values), left.grad, right.grad])
    for number, (found, expected) in enumerate(zip(*results, strict=True)):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < (1e-5 if number < 2 or dtype is torch.float32 else 2e-2)


@gpu_only
def test_the_loss_waits_for_nothing() -> None:
    batch, logprobs_T = batch_of([9, 4, 12, 7, 5])
    inputs = LossInputs.gather(batch.add(prepare(batch, ESPO(), None, VOCABULARY))).map(lambda t: t.to(DEVICE))
    new_R = logprobs_T[batch.trained_R].to(DEVICE).requires_grad_()
    loss = make_loss(ESPO(), ReferenceKL(coefficient=0.1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(new_R, new_R.detach(), inputs).value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_deterministic_steps_have_equal_bits(model: Path, dtype: str) -> None:
    first, second = (step(model, dtype, deterministic=True) for _ in range(2))
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
