"""Grouped experts against megatron's loop over experts: values, gradients, and that no weight is copied."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.data.types import Batch
from megatron_rl.distributed.mesh import start_world
from megatron_rl.errors import ConfigError
from megatron_rl.models.hf_mapping.gpt_oss import quick_gelu
from megatron_rl.policy import layers
from megatron_rl.policy.backends import Backends
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.experts import ExpertMatrices, GroupedExperts, grouped_linear, grouped_product, strided
from megatron_rl.policy.hf_weights import shards_of
from megatron_rl.policy.model import _built
from tests.policy import families
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


@pytest.mark.processes
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("one rank", "float32"), ("one rank", "bfloat16"), ("tensor and expert", "float32")],
)
def test_grouped_experts_give_what_the_loop_gives(model: Path, layout: str, dtype: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    arguments = (str(model), parallel, {"dtype": dtype}, case())
    grouped, looped = (
        run_ranks(how, ranks, *arguments, initialize=False, timeout_seconds=280)[0] for how in (one_step, by_loop)
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
    policy.forward_backward(policy.local_part(case()), weighted)
    modules = [m for m in policy.chunks[0].modules() if isinstance(m, GroupedExperts)]
    assert not [m for m in policy.chunks[0].modules() if isinstance(m, SequentialMLP)]
    matrices = [side.weights for module in modules for side in module.matrices]
    gradients = [strided([getattr(weight, "main_grad") for weight in weights]) for weights in matrices]  # noqa: B009
    return {
        "some": len(matrices) == 6,
        "weights": all(strided(weights) is not None for weights in matrices),
        "gradients": all(view is not None and bool(view.abs().sum() > 0) for view in gradients),
    }


@pytest.mark.processes
def test_weights_and_gradients_are_views_in_megatron_s_buffers(model: Path) -> None:
    found = run_ranks(views, 1, str(model), initialize=False)[0]
    assert found == dict.fromkeys(found, True)


def test_matrices_at_uneven_distances_are_stacked() -> None:
    memory = torch.arange(60.0).view(10, 6)
    even, uneven = [memory[n] for n in (0, 3, 6)], [memory[n] for n in (0, 3, 7)]
    descending, apart = [memory[n] for n in (6, 3, 0)], [memory[0], memory[3].clone(), memory[6]]
    assert strided(even) is not None
    for matrices in (uneven, descending, apart):
        assert strided(matrices) is None
    for matrices in (even, uneven, descending, apart):
        weights = ExpertMatrices([torch.nn.Parameter(matrix) for matrix in matrices])
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
    out_TO = grouped_linear(tokens_TI, counts.cumsum(0).int(), ExpertMatrices(weights))
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


GPT_OSS = {
    "num_moe_experts": 3,
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "moe_ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "gated_linear_unit": True,
    "add_bias_linear": True,
    "activation_func": quick_gelu,
    "activation_func_clamp_value": 0.7,
    "glu_linear_offset": 1.0,
    "use_cpu_initialization": True,
    "params_dtype": torch.float64,
}


def biased(_: str) -> dict[str, bool]:
    """Return whether experts with biases are what they are written out, in values and in every gradient."""
    start_world(60, deterministic=True)
    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection(expt_tp=parallel_state.get_expert_tensor_parallel_group())
    torch.manual_seed(0)
    experts = GroupedExperts(3, TransformerConfig(**GPT_OSS), pg_collection=groups)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    tokens_TH, counts_E = torch.randn(9, 16, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    probs_T = torch.rand(9, dtype=torch.float64, requires_grad=True)
    upstream_TH = torch.randn(9, 16, dtype=torch.float64)
    leaves = [tokens_TH, probs_T, *experts.parameters()]

    out_TH, _ = experts(tokens_TH, counts_E, probs_T)
    found = torch.autograd.grad(out_TH, leaves, upstream_TH)

    rows, parts = torch.arange(3).repeat_interleave(counts_E).tolist(), list[Tensor]()
    for token_H, prob, number in zip(tokens_TH, probs_T, rows, strict=True):
        own = dict(experts.local_experts.get_submodule(str(number)).named_parameters())
        gate_F, up_F = (own["linear_fc1.weight"] @ token_H + own["linear_fc1.bias"]).chunk(2)
        gate_F, up_F = gate_F.clamp(max=0.7), up_F.clamp(-0.7, 0.7)
        inner_F = (up_F + 1) * gate_F * torch.sigmoid(1.702 * gate_F)
        parts.append(prob * (own["linear_fc2.weight"] @ inner_F + own["linear_fc2.bias"]))
    expected_TH = torch.stack(parts)
    truth = torch.autograd.grad(expected_TH, leaves, upstream_TH, allow_unused=True)
    pairs = zip(found, truth, strict=True)
    return {
        "values": torch.allclose(out_TH, expected_TH),
        "gradients": all(torch.allclose(a, torch.zeros_like(a) if b is None else b) for a, b in pairs),
        "some": all(bool(gradient.any()) for gradient in found[:2]),
    }


@pytest.mark.processes
def test_experts_with_biases_and_a_clamped_gate_are_what_they_are_written_out() -> None:
    found = run_ranks(biased, 1, "", initialize=False)[0]
    assert found == dict.fromkeys(found, True)


def grad_norms(folder: str, parallel: dict[str, object]) -> tuple[float, dict[str, Tensor]]:
    """Return the norm of the gradient of one step, and the gradients that the main rank has."""
    policy = Policy(run_of(Path(folder), parallel=parallel), start_world(60, deterministic=True), total_updates=1)
    policy.forward_backward(policy.local_part(case()), weighted, whole_gradients=True)
    gradients = {name: tensor.double().clone() for name, tensor in policy.gradients()}
    return policy.optim_step().grad_norm, gradients


@pytest.mark.processes
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "expert": 2}], ids=["one", "shared", "apart"])
def test_the_norm_counts_every_bias_of_an_expert_once(tmp_path: Path, parallel: dict[str, object]) -> None:
    """``shared``: both ranks have a bias whole; ``apart``: each has other experts, whose biases none of them cuts."""
    folder = families.save("gpt_oss", tmp_path / "hf")
    norm, gradients = run_ranks(grad_norms, 2 if parallel else 1, str(folder), parallel, initialize=False)[0]
    whole = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    assert norm == pytest.approx(whole, rel=1e-5)  # float32


def bias_gradients(folder: str, parallel: dict[str, object]) -> dict[str, Tensor]:
    """Return this rank's gradient of every bias that each expert-tensor rank holds in full."""
    policy = Policy(run_of(Path(folder), parallel=parallel), start_world(60, deterministic=True), total_updates=1)
    policy.forward_backward(policy.local_part(case()), weighted, whole_gradients=True)
    shards = shards_of(policy.chunks, policy.family, policy.mesh)
    return {
        shard.full_name: getattr(shard.parameter, "main_grad").double().clone()  # noqa: B009 (not of Tensor)
        for shard in shards
        if shard.name.is_expert and shard.name.rule.dim is None
    }


@pytest.mark.processes
def test_ranks_that_share_an_expert_train_its_bias_alike(tmp_path: Path) -> None:
    """Only rank 0 adds the bias of the down matrix; without its gradient, the other ranks' copies would diverge."""
    folder = families.save("gpt_oss", tmp_path / "hf")
    (truth,) = run_ranks(bias_gradients, 1, str(folder), {}, initialize=False)
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    assert largest > 0
    for found in run_ranks(bias_gradients, 2, str(folder), {"tensor": 2}, initialize=False):
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():  # float32, in another order
            torch.testing.assert_close(found[name], gradient, atol=5e-6 * largest, rtol=0, msg=name)


def test_what_cannot_train_biases_is_refused() -> None:
    settings: dict[str, object] = {"add_bias_linear": True, "expert_tensor_parallel_size": 2}
    for engine, words in ((True, r"expert_tensor is 2.*expert_tensor = 1"), (False, "leave experts out of")):
        with pytest.raises(ConfigError, match=words):
            _built(TransformerConfig, settings, Backends(engine, False, False, False, False))
