"""Matrix products of 16-bit inputs with a float32 result, without rounding to 16 bits.

Legend: M rows of the left matrix, C columns of the result (rows of the right matrix), I contracted dimension.

On a GPU, torch has such products (``out_dtype``). On a CPU it has none in its public interface, but libtorch exports
the kernel that its attention uses (oneDNN's ``brgemm``: bfloat16 products accumulated in float32). This module calls
that kernel if the processor has the instructions and a trial product is correct. Otherwise inputs are converted to
float32, which takes more than twice the time.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.ops.vocab import wide

Kernel = Literal["own type", "wide result", "brgemm", "widened"]
"""How a product is computed: in the inputs' dtype, which is float32 or float64 already; by ``out_dtype``; by oneDNN; or
after conversion to float32."""

PANEL = 64
"""Columns per kernel call: the right matrix is repacked in panels of this width."""

BLOCK_BYTES = 2 * 1024**2
"""Size of a block of rows of the left matrix, chosen to stay in cache while all panels are processed."""

DEPTH = 256
"""Length of the contracted dimension per kernel call; adding up shorter partial sums loses fewer bits."""

BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
"""``at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add_C, const BFloat16*, const BFloat16*, float*, is_vnni)``:
the mangled name encodes the argument types, so a library with this symbol accepts these arguments."""

BRGEMM_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
"""Releases the thread's tile registers that the kernel configured."""

ISA_LIMITS = ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that disable instructions. If one is set, the kernel is not used: it could crash."""


def kernel_for(tensor: Tensor) -> Kernel:
    """Return how products with this left matrix are computed."""
    if tensor.dtype == wide(tensor.dtype):
        return "own type"
    if tensor.is_cuda:
        return "wide result"
    paired = tensor.dtype == torch.bfloat16 and tensor.shape[-1] % 2 == 0
    return "brgemm" if paired and brgemm_found() else "widened"


class WideProducts:
    """left @ right^T in float32 or float64, for one left matrix and many right matrices.

    Attributes:
        dtype: dtype of the results.
    """

    def __init__(self, left_MI: Tensor) -> None:
        self.dtype = wide(left_MI.dtype)
        self._kernel = kernel_for(left_MI)
        self._left_MI = (left_MI.to(self.dtype) if self._kernel == "widened" else left_MI).contiguous()

    def into(self, out_MC: Tensor, right_CI: Tensor) -> Tensor:
        """Write the product with ``right_CI`` to ``out_MC``, which must be contiguous, and return it."""
        if self._kernel == "brgemm":
            return _brgemm_into(out_MC, self._left_MI, right_CI)
        if self._kernel == "wide result":
            return torch.mm(self._left_MI, right_CI.T, out_dtype=self.dtype, out=out_MC)
        return torch.mm(self._left_MI, right_CI.T.to(self.dtype), out=out_MC)


@cache
def brgemm_found() -> bool:
    """Return whether oneDNN's bfloat16 products with a float32 result work on this CPU."""
    usable = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if not usable or not known() or any(os.environ.get(name) for name in ISA_LIMITS):
        return False
    try:
        _exported()
    except (OSError, AttributeError):
        return False
    generator = torch.Generator().manual_seed(0)
    left_MI, right_CI = (torch.randn(rows, 34, generator=generator).bfloat16() for rows in (5, PANEL + 7))
    found_MC = _brgemm_into(torch.empty(5, PANEL + 7), left_MI, right_CI)
    # Sums of 34 products of values up to about 4, in float32.
    return bool(torch.allclose(found_MC, left_MI.float() @ right_CI.float().T, rtol=0, atol=1e-4))


@cache
def _exported() -> tuple[Callable[..., None], Callable[[bool], None]]:
    """Return libtorch's brgemm and its release function; raises AttributeError or OSError if they do not exist."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    product, release = library[BRGEMM], library[BRGEMM_RELEASE]
    product.argtypes = [ctypes.c_long] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    release.argtypes = [ctypes.c_bool]
    product.restype = release.restype = None
    return product, release


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked process does not inherit its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"brgemm-{process}")


def _brgemm_into(out_MC: Tensor, left_MI: Tensor, right_CI: Tensor) -> Tensor:
    panels = _panels(right_CI)
    threads = min(torch.get_num_threads(), len(panels))
    if threads <= 1:
        _multiply(out_MC, left_MI, panels, 0, len(panels))
        return out_MC
    bounds = [len(panels) * i // threads for i in range(threads + 1)]
    parts = [
        _pool(os.getpid(), threads).submit(_multiply, out_MC, left_MI, panels, first, last)
        for first, last in pairwise(bounds)
    ]
    for part in parts:
        part.result()
    return out_MC


def _panels(right_CI: Tensor) -> Tensor:
    """Return the matrix repacked as [panels, K / 2, ``PANEL``] int32, each holding two bfloat16 of a column."""
    columns, width = right_CI.shape
    padded = -(-columns // PANEL) * PANEL
    if padded != columns:
        right_CI = torch.nn.functional.pad(right_CI, (0, 0, 0, padded - columns))
    pairs = right_CI.contiguous().view(torch.int32)
    return pairs.view(padded // PANEL, PANEL, width // 2).transpose(1, 2).contiguous()


def _multiply(out_MC: Tensor, left_MI: Tensor, panels: Tensor, first: int, last: int) -> None:
    """Multiply by panels ``first`` to ``last``, one block of rows at a time, in the calling thread."""
    product, release = _exported()
    (num_rows, width), columns = left_MI.shape, out_MC.shape[1]
    block = max(BLOCK_BYTES // (2 * width), 1)
    panel_bytes = panels[0].nbytes
    for row in range(0, num_rows, block):
        rows = min(block, num_rows - row)
        left = left_MI.data_ptr() + 2 * row * width
        for panel in range(first, last):
            column = panel * PANEL
            right, out = panels.data_ptr() + panel * panel_bytes, out_MC.data_ptr() + 4 * (row * columns + column)
            count = min(PANEL, columns - column)
            for k in range(0, width, DEPTH):
                depth, adds = min(DEPTH, width - k), k > 0
                product(rows, count, depth, width, PANEL, columns, adds, left + 2 * k, right + 2 * PANEL * k, out, True)
    release(True)
