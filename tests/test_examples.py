"""The scripts of examples/ run, and give what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_rl
from megatron_rl.config.from_file import find_object
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_the_custom_objective_is_its_formula():
    random = torch.Generator().manual_seed(0)
    old, new, entropies = (torch.rand(2, 6, generator=random, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    new = (-new).requires_grad_()
    result = megatron_rl.policy_loss(
        {"name": str(EXAMPLES / "custom_objective.py:TruncatedIS"), "cap": 1.2, "min_entropy": 0.3},
        logprobs=new,
        old_logprobs=-old,
        advantages=advantages,
        loss_mask=mask,
        entropies=entropies,
    )
    result.loss.backward()
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for i, count in enumerate((4, 6)):
        for t in range(count):
            if entropies[i, t] >= 0.3:
                ratio = float((new.detach()[i, t] + old[i, t]).exp())
                expected[i, t] = -min(ratio, 1.2) * advantages[i] / (2 * count)
    torch.testing.assert_close(new.grad, expected, rtol=1e-12, atol=0)
    assert float(result.loss) == pytest.approx(float((expected * new.detach()).sum()), rel=1e-12)


def test_the_overlay_of_the_custom_objective_names_the_file_beside_it():
    run = load(Run, [ROOT / "configs" / "demo.toml", EXAMPLES / "custom_objective.toml"]).run
    assert run.objective.name == str(EXAMPLES / "custom_objective.py:TruncatedIS")
    assert run.objective.label == "custom_objective.py:TruncatedIS"


@pytest.mark.processes
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_plain_loop_gives_the_gradient_of_the_whole_batch_on_any_number_of_ranks(aggregation):
    """Up to float32 rounding of sums of 16 responses."""
    example = find_object(str(EXAMPLES / "plain_pytorch.py:train")).__globals__
    model = example["Model"]()
    torch.manual_seed(0)
    model = example["Model"]()
    tokens, mask, advantages = example["sampled_batch"]()
    old_logprobs = model(tokens).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        megatron_rl.policy_loss(
            {"name": "grpo", "clip_high": 0.28, "aggregation": aggregation},
            logprobs=model(tokens),
            old_logprobs=old_logprobs,
            advantages=advantages,
            loss_mask=mask,
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for ranks in (1, 2):
        for parameters in run_ranks(example["train"], ranks, 3, aggregation):
            for found, expected in zip(parameters, model.parameters(), strict=True):
                torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.processes
def test_the_plain_loop_runs_as_a_script():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*command, str(EXAMPLES / "plain_pytorch.py")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "norm of the parameters" in done.stdout
