"""The stand-ins of transformer-engine's kernels against the originals, where a CPU can run or describe them."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.te, pytest.mark.processes]

ROOT = Path(__file__).resolve().parents[2]


def test_the_stand_ins_have_the_parameters_of_the_extension() -> None:
    import transformer_engine_torch as tex

    from tests.te import attention_kernels, kernels, optimizer_kernels

    wrong = []
    for functions in (kernels.FUNCTIONS, attention_kernels.FUNCTIONS, optimizer_kernels.FUNCTIONS):
        for name, function in functions.items():
            described = re.match(r"\w+\((.*)\) -> ", getattr(tex, name).__doc__ or "")
            assert described, name
            originals = re.findall(r"(\w+): ", re.sub(r"\[.*?\]", "", described[1]))
            ours = list(inspect.signature(function).parameters)
            named = [a for a, b in zip(originals, ours, strict=False) if not a.startswith("arg") and a != b]
            if len(originals) != len(ours) or named:
                wrong.append((name, originals, ours))
    assert wrong == []


def test_the_permutation_is_that_of_the_kernels() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when transformer-engine is imported
    command = [sys.executable, "-W", "ignore", "-m", "tests.te.test_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_smoke_stage_of_a_gpu_runs_with_the_stand_ins(tmp_path: Path) -> None:
    command = ["benchmarks/gpu.sh", str(tmp_path), "smoke", "--device", "cpu", "--tiny", "--doubles"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert figures["smoke-parity"]["engine"].keys() == figures["smoke-parity"]["local"].keys()
    assert "TEDotProductAttention" in figures["smoke-spec"]["engine"]["attention"]


def compare_permutations() -> None:
    """Compare stand-ins with the Triton kernels, which the interpreter runs."""
    import transformer_engine.pytorch  # noqa: F401 (loads the library that the next line needs)
    from transformer_engine.pytorch.triton import permutation as real

    from tests.te import permutation_kernels as ours

    for kernel in list(vars(real).values()):
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]  # the autotuner needs a GPU
    for factory in ("empty", "zeros"):
        make = getattr(torch, factory)
        setattr(torch, factory, lambda *a, make=make, device=None, **kwargs: make(*a, **kwargs))
    torch.manual_seed(0)
    tokens, experts, hidden = 7, 4, 8
    routing_map = torch.rand(tokens, experts) < 0.5
    rows = int(routing_map.sum())
    inputs, probs = torch.randn(tokens, hidden), torch.rand(tokens, experts)
    maps = [module.make_row_id_map(routing_map, tokens, experts) for module in (real, ours)]
    results = []
    for module, row_id_map in zip((real, ours), maps, strict=True):
        permuted = module.permute_with_mask_map(
            inputs, row_id_map, probs, None, None, tokens, experts, rows, hidden, None
        )
        back = module.unpermute_with_mask_map(permuted[0], row_id_map, None, permuted[2], None, tokens, experts, hidden)
        order = module.make_chunk_sort_map(torch.tensor([2, 0, 4, 1]), torch.tensor([2, 3, 0, 1]), tokens, 4)
        there = module.sort_chunks_by_map(inputs, order, probs[:, 0].contiguous(), tokens, hidden, True)
        home = module.sort_chunks_by_map(there[0], order, there[1], tokens, hidden, False)
        assert back[1] is not None
        back_probs = back[1].where(routing_map, 0)
        results.append((permuted[0], permuted[2], back[0], back_probs, order, *there, *home))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


if __name__ == "__main__":
    compare_permutations()
