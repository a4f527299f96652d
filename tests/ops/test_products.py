"""16-bit products with a float32 result: exact to float32 sums, whatever forms them."""

import pytest
import torch
from torch import Tensor

from megatron_rl.ops import products
from megatron_rl.ops.products import PANEL, WideProducts, brgemm_found, kernel_for
from tests.ranks import run_ranks

needs_brgemm = pytest.mark.skipif(not brgemm_found(), reason="this processor or torch has no bfloat16 brgemm")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    wide = WideProducts(left)
    return wide.into(torch.full((len(left), len(right)), torch.nan, dtype=wide.dtype), right)


@pytest.fixture
def threads_kept():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forgetful():
    """What was found of the machine is looked for again, in the test and after it."""
    brgemm_found.cache_clear()
    yield
    brgemm_found.cache_clear()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(0, 5, 4), (1, 1, 2), (7, PANEL, 34), (5, 2 * PANEL + 3, 700), (3, 70, 33), (1200, 65, 2048)],
)
def test_a_product_rounds_nothing_but_its_sums(rows, columns, width, dtype, threads, threads_kept):
    torch.set_num_threads(threads)
    left, right = random(rows, width, dtype=dtype), random(columns, width, dtype=dtype, seed=1)
    wanted = left.double() @ right.double().T
    # float32 sums of `width` products; rounding the result to bfloat16 would be off by 2^-9 of it.
    torch.testing.assert_close(product(left, right).double(), wanted, rtol=0, atol=2e-6 * width**0.5)


@needs_brgemm
def test_rows_and_slices_that_are_not_packed_are_taken_as_they_are():
    left, right = random(40, 64, dtype=torch.bfloat16).T, random(90, 80, dtype=torch.bfloat16, seed=1)[10:, ::2]
    torch.testing.assert_close(product(left, right), left.float() @ right.float().T, rtol=0, atol=1e-5)


@needs_brgemm
def test_a_product_repeats_bit_for_bit_on_any_number_of_threads(threads_kept):
    left, right = random(300, 1024, dtype=torch.bfloat16), random(1000, 1024, dtype=torch.bfloat16, seed=1)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(product(left, right))
    assert all(torch.equal(results[0], other) for other in results[1:])


def _product_on_two_threads(left: Tensor, right: Tensor) -> Tensor:
    torch.set_num_threads(2)
    return product(left, right)


@pytest.mark.processes
@needs_brgemm
def test_a_forked_process_has_threads_of_its_own(threads_kept):
    left, right = random(8, 64, dtype=torch.bfloat16), random(500, 64, dtype=torch.bfloat16, seed=1)
    torch.set_num_threads(2)
    wanted = product(left, right)
    torch.set_num_threads(1)
    assert all(torch.equal(found, wanted) for found in run_ranks(_product_on_two_threads, 2, left, right))


def test_which_kernel_serves_what(monkeypatch):
    monkeypatch.setattr(products, "brgemm_found", lambda: True)
    kernels = {dtype: kernel_for(torch.zeros(1, 8, dtype=dtype)) for dtype in (torch.float32, torch.float64)}
    assert set(kernels.values()) == {"own type"}
    assert kernel_for(torch.zeros(1, 8, dtype=torch.bfloat16)) == "brgemm"
    assert kernel_for(torch.zeros(1, 7, dtype=torch.bfloat16)) == "widened"
    assert kernel_for(torch.zeros(1, 8, dtype=torch.float16)) == "widened"
    monkeypatch.setattr(products, "brgemm_found", lambda: False)
    assert kernel_for(torch.zeros(1, 8, dtype=torch.bfloat16)) == "widened"


@pytest.mark.parametrize("variable", products.ISA_LIMITS)
def test_forbidden_instructions_are_left_alone(monkeypatch, forgetful, variable):
    monkeypatch.setenv(variable, "AVX2")
    assert not brgemm_found()


def test_a_library_without_the_kernel_widens(monkeypatch, forgetful):
    def missing() -> None:
        raise AttributeError("no such symbol")

    monkeypatch.setattr(products, "_exported", missing)
    assert not brgemm_found()


@needs_brgemm
def test_a_kernel_that_multiplies_wrongly_is_not_used(monkeypatch, forgetful):
    monkeypatch.setattr(products, "_panels", lambda right: torch.zeros(2, 17, PANEL, dtype=torch.int32))
    assert not brgemm_found()
