"""The Triton kernels against the eager passes: on a GPU, else in Triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.ops.head import head_logprobs_entropies
from megatron_rl.ops.tiles import UpstreamGradients, eager_passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED), reason="Triton is missing, or there is no GPU for it"
)


@pytest.mark.processes
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the others run here")
def test_the_kernels_in_the_interpreter() -> None:
    # Triton reads the variable when a kernel is defined, and torch.compile defines kernels too: not in this process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.processes
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="what is interpreted cannot be compiled")
@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
def test_the_kernels_compile_for_a_gpu_that_need_not_be_here(logits: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_rl.ops import kernels

    floats = dict.fromkeys(("sums", "scale", "normalizers", "entropies", "us", "vs"), "*fp32")
    types = {**floats, "logits": logits, "out": logits, "targets": "*i64", "num_rows": "i32", "columns": "i32"}
    types |= {"lowest": "fp32", "lowest_log": "fp32"}
    values = {"BLOCK": kernels.BLOCK_COLUMNS, "HAS_U": True, "HAS_V": True}
    for kernel in (kernels._sums_kernel, kernels._slopes_kernel):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, {name: values[name] for name in names if name in values})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
        assert compiled.asm["cubin"]


def tile(num_rows: int, columns: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return (scale * torch.randn(num_rows, columns, generator=generator)).to(dtype).to(DEVICE)


@runs
@pytest.mark.parametrize(("num_rows", "columns"), [(3, 5000), (1, 7), (2, 2048), (0, 9)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_sums_are_the_eager_ones(num_rows: int, columns: int, scale: float) -> None:
    from megatron_rl.ops.kernels import kernel_passes

    logits_RC, factor = tile(num_rows, columns, scale), torch.tensor(0.7, device=DEVICE)
    logits_RC[:1] = -torch.inf  # a row of tokens that the model lacks
    found, expected = (passes.sums(logits_RC, factor) for passes in (kernel_passes(), eager_passes()))
    # float32 sums of up to 5,000 terms in another order.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)


@runs
@pytest.mark.parametrize("which", ["u", "v", "both", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_are_the_eager_ones(which: str, dtype: torch.dtype) -> None:
    from megatron_rl.ops.kernels import kernel_passes

    logits_RC = tile(4, 3000, 3.0, dtype)
    factor = torch.tensor(1.25, device=DEVICE)
    logs_RC = torch.log_softmax(logits_RC.float() * factor, -1)
    entropies_R = -(logs_RC.exp() * logs_RC).sum(-1)
    saved_2R = torch.stack(((logits_RC.float() * factor).logsumexp(-1), entropies_R))
    u_R, v_R = (torch.linspace(-1, 2, 4, device=DEVICE) * sign for sign in (1, -1))
    upstream = UpstreamGradients(
        saved_2R, u_R if which in ("u", "both") else None, v_R if which in ("v", "both") else None
    )
    columns_R = torch.tensor([0, 2999, -5, 4000], device=DEVICE)  # two targets lie in other tiles
    outs = []
    for passes in (kernel_passes(), eager_passes()):
        out_RC = logits_RC.clone()
        passes.slopes(out_RC, out_RC, columns_R, upstream, factor)  # in place
        outs.append(out_RC.float())
    tolerance = 1e-6 if dtype is torch.float32 else 8e-3  # a bfloat16 of 2 is rounded to 2^-7
    torch.testing.assert_close(*outs, rtol=tolerance, atol=1e-6)


@runs
def test_the_whole_operation_is_that_of_the_plain_backend() -> None:
    generator = torch.Generator().manual_seed(0)
    targets_R = torch.tensor([0, 49, 17, 30, 8], device=DEVICE)
    results = {}
    for backend in ("plain", "tiles+triton"):
        hidden_RH, weight_VH = (
            torch.randn(shape, generator=generator.manual_seed(1)).to(DEVICE).requires_grad_()
            for shape in ((5, 8), (50, 8))
        )
        values = head_logprobs_entropies(
            hidden_RH, weight_VH, targets_R, temperature=0.8, vocab_size=47 + 3, backend=backend
        )
        (values[0].sum() + 2 * values[1].sum()).backward()
        results[backend] = (*values, hidden_RH.grad, weight_VH.grad)
    for found, expected in zip(results["tiles+triton"], results["plain"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed")
def test_without_triton_the_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the package triton"):
        head_logprobs_entropies(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), backend="tiles+triton"
        )
