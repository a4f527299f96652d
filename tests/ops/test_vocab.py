"""Log-probabilities and entropies from vocabulary shards and from the fused head, against the full softmax."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from megatron_rl.errors import ConfigError
from megatron_rl.ops import head, vocab
from megatron_rl.ops.head import (
    HeadLogprobs,
    VocabShard,
    choose_backend,
    describe_backend,
    head_logprobs_entropies,
)
from megatron_rl.ops.tiles import TilePasses, compiled_passes, compiler_found, eager_passes
from megatron_rl.ops.vocab import vocab_logprobs_entropies
from tests.ranks import run_ranks

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""float64: sums over a few hundred terms in another order."""


def full(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with p log p := 0 at p = 0."""
    logs = torch.log_softmax(logits / temperature, -1)
    terms = torch.where(logs.isinf(), 0, logs.exp() * torch.where(logs.isinf(), 0, logs))
    return logs.gather(-1, targets[..., None])[..., 0], -terms.sum(-1)


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_known_answers():
    logits, targets = torch.tensor([[0.0, 1, 2, 3]], dtype=torch.float64), torch.tensor([2])
    for temperature, logprob, entropy in ((1.0, -1.440189699, 0.947536964), (0.6, -1.874727071, 0.587659565)):
        results = vocab_logprobs_entropies(logits, targets, temperature=temperature)
        # As many digits as were written down; the last is cut, not rounded.
        assert [value.item() for value in results] == pytest.approx([logprob, entropy], abs=1e-9)


@given(
    size=st.integers(1, 9),
    rows=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    temperature=st.sampled_from([1.0, 0.6, 3.0]),
    chunk=st.sampled_from([1, 1 << 22]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_value_and_gradient_equal_the_definition(size, rows, scale, temperature, chunk, seed):
    logits = (scale * random(rows, size, seed=seed)).requires_grad_()
    targets = torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(seed))
    upstream = random(2, rows, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_rl.ops.vocab.CHUNK_ELEMENTS", chunk)
        actual = vocab_logprobs_entropies(logits, targets, temperature=temperature)
        gradient = torch.autograd.grad((torch.stack(actual) * upstream).sum(), logits)
    expected = full(logits, targets, temperature)
    # The logits themselves are rounded relative to their size.
    close = {"rtol": 1e-12, "atol": 1e-12 * max(scale, 1)}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(gradient, torch.autograd.grad((torch.stack(expected) * upstream).sum(), logits), **close)


def test_gradient_equals_finite_differences():
    logits, targets = random(3, 5).requires_grad_(), torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: vocab_logprobs_entropies(z, targets, temperature=0.7), logits)


def test_only_one_of_the_outputs_may_be_used():
    targets = torch.tensor([0, 4, 2])
    for i in (0, 1):
        logits = random(3, 5).requires_grad_()
        actual = torch.autograd.grad(vocab_logprobs_entropies(logits, targets)[i].sum(), logits)
        expected = torch.autograd.grad(full(logits, targets, 1.0)[i].sum(), logits)
        torch.testing.assert_close(actual, expected, **EXACT)


def test_leading_dimensions_are_kept_and_wrong_ones_refused():
    logits, targets = random(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    logprobs, entropies = vocab_logprobs_entropies(logits, targets)
    assert logprobs.shape == entropies.shape == (2, 3)
    torch.testing.assert_close((logprobs, entropies), full(logits, targets, 1.0), **EXACT)
    with pytest.raises(ValueError, match=r"logits \[2, 3, 5\] do not match targets \[2\]"):
        vocab_logprobs_entropies(logits, targets[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_formed_in_float32(dtype):
    logits, targets = random(6, 300, dtype=dtype) * 3, torch.arange(6)
    actual = vocab_logprobs_entropies(logits, targets)
    expected = full(logits.double(), targets, 1.0)
    assert actual[0].dtype == torch.float32
    # float32 sums of 300 terms.
    torch.testing.assert_close(tuple(x.double() for x in actual), expected, rtol=1e-6, atol=2e-6)


SIZES = [1, 2, 4]


@pytest.mark.processes
@pytest.mark.parametrize("size", SIZES)
def test_shards_of_the_vocabulary_give_the_whole_one(size):
    """13 tokens padded with -inf to 16 or 20: on four ranks of 5 the last one holds nothing but padding."""
    cases = []
    for width, temperature in itertools.product((16, 20), (1.0, 0.6)):
        logits = random(7, width, seed=width) * 5
        logits[:, 13:] = -torch.inf
        # Inside the vocabulary, too, a token may be ruled out.
        logits[2, 3] = -torch.inf
        cases.append((logits, torch.tensor([0, 12, 5, 7, 4, 8, 11]), random(2, 7, seed=1), temperature))

    def on_rank():
        results = []
        for logits, targets, upstream, temperature in cases:
            shard = logits.chunk(size, 1)[dist.get_rank()].clone().requires_grad_()
            outputs = vocab_logprobs_entropies(shard, targets, temperature=temperature, group=dist.group.WORLD)
            (torch.stack(outputs) * upstream).sum().backward()
            results.append((torch.stack(outputs).detach(), gradient_of(shard)))
        return results

    ranks = run_ranks(on_rank, size)
    for i, (logits, targets, upstream, temperature) in enumerate(cases):
        whole = logits.clone().requires_grad_()
        expected = torch.stack(full(whole, targets, temperature))
        (gradient,) = torch.autograd.grad((expected * upstream).sum(), whole)
        for result in ranks:
            torch.testing.assert_close(result[i][0], expected.detach(), **EXACT)
        torch.testing.assert_close(torch.cat([result[i][1] for result in ranks], 1), gradient.nan_to_num(0), **EXACT)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(head.TILE_COLUMNS, "cpu", 8)


def masked(logits: Tensor, mask_ids: Tensor | None, targets: Tensor) -> Tensor:
    """The logits with those outside of the ids, and of the target, at -inf; rows of -1 are left as they are."""
    if mask_ids is None:
        return logits
    excluded = torch.tensor(
        [
            [bool((kept >= 0).any()) and i not in kept.tolist() and i != target for i in range(logits.shape[1])]
            for kept, target in zip(mask_ids, targets.tolist(), strict=True)
        ]
    ).view(logits.shape)
    return logits.masked_fill(excluded, -torch.inf)


MASK_IDS = torch.tensor(
    [[0, 3, -1, -1], [26, -1, -1, -1], [-1, -1, -1, -1], [9, 20, 1, 8], [2, 2, -1, 25], [15, 3, 7, -1]],
    dtype=torch.int32,
)
"""Of six tokens; the target of the fifth, and padding between its ids, are not in it."""


def head_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, temperature: float, size: int, mask_ids=None
):
    """(outputs, gradients) in float64 from the definition."""
    hidden, weight = (tensor.detach().double().clone().requires_grad_() for tensor in (hidden, weight))
    outputs = torch.stack(full(masked((hidden @ weight.T)[:, :size], mask_ids, targets), targets, temperature))
    gradients = torch.autograd.grad((outputs * upstream).sum(), (hidden, weight))
    return outputs.detach(), *gradients


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["plain", "tiles"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_head_equals_the_definition(backend, temperature, rows):
    hidden, weight = random(rows, 5, seed=1).requires_grad_(), random(30, 5, seed=2).requires_grad_()
    targets, upstream = torch.tensor([0, 26, 7, 8, 15, 16])[:rows], random(2, rows, seed=3)
    expected = head_reference(hidden.detach(), weight.detach(), targets, upstream, temperature, 27)
    outputs = head_logprobs_entropies(hidden, weight, targets, temperature=temperature, vocab_size=27, backend=backend)
    gradients = torch.autograd.grad((torch.stack(outputs) * upstream).sum(), (hidden, weight))
    torch.testing.assert_close((torch.stack(outputs).detach(), *gradients), expected, **EXACT)
    assert not gradients[1][27:].any(), "padding has a gradient"


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["plain", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sampling_mask_restricts_the_head_to_the_kept_ids(backend, dtype):
    hidden, weight = random(6, 5, seed=1, dtype=dtype), random(30, 5, seed=2, dtype=dtype)
    targets, upstream = torch.tensor([0, 26, 7, 8, 16, 15]), random(2, 6, seed=3)
    expected = head_reference(hidden, weight, targets, upstream, 0.6, 27, MASK_IDS)
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = torch.stack(
        head_logprobs_entropies(
            hidden, weight, targets, temperature=0.6, vocab_size=27, mask_ids_RQ=MASK_IDS, backend=backend
        )
    )
    gradients = torch.autograd.grad((outputs * upstream).sum(), (hidden, weight))
    assert outputs[0, 1] == 0.0  # one id is kept
    # bfloat16: as in test_head_in_bfloat16_is_as_exact_as_its_inputs.
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(outputs.double(), expected[0], rtol=1e-12, atol=atol)
    for actual, wanted in zip(gradients, expected[1:], strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(actual, wanted, **EXACT)
        else:
            assert (actual.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.processes
@pytest.mark.usefixtures("small_tiles")
def test_shards_of_a_masked_vocabulary_give_the_whole_one():
    hidden, weight = random(6, 5, seed=1), random(30, 5, seed=2)
    targets, upstream = torch.tensor([0, 26, 7, 8, 16, 15]), random(2, 6, seed=3)
    expected = head_reference(hidden, weight, targets, upstream, 1.0, 27, MASK_IDS)

    def on_rank():
        leaf, shard = hidden.clone().requires_grad_(), weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
        outputs = torch.stack(
            head_logprobs_entropies(
                leaf, shard, targets, group=dist.group.WORLD, vocab_size=27, mask_ids_RQ=MASK_IDS, backend="tiles"
            )
        )
        return outputs.detach(), *torch.autograd.grad((outputs * upstream).sum(), (leaf, shard))

    first, second = run_ranks(on_rank, 2)
    for outputs in (first[0], second[0]):
        torch.testing.assert_close(outputs, expected[0], **EXACT)
    torch.testing.assert_close(first[1] + second[1], expected[1], **EXACT)
    torch.testing.assert_close(torch.cat((first[2], second[2])), expected[2], **EXACT)


@pytest.mark.processes
@pytest.mark.usefixtures("small_tiles")
def test_head_repeats_bit_for_bit_and_matches_without_gradient():
    hidden, weight = random(6, 5, dtype=torch.float32), random(30, 5, seed=1, dtype=torch.float32)
    targets = torch.arange(6)
    with torch.no_grad():
        scored = head_logprobs_entropies(hidden, weight, targets)
    trained = head_logprobs_entropies(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert all(torch.equal(a, b) for a, b in zip(scored, trained, strict=True))


@pytest.mark.processes
@pytest.mark.usefixtures("small_tiles")
def test_head_gives_only_the_gradients_that_are_asked_for():
    hidden, weight, targets = random(6, 5), random(30, 5, seed=1), torch.arange(6)
    upstream = torch.stack((torch.ones(6), torch.zeros(6))).double()
    _, hidden_gradient, weight_gradient = head_reference(hidden, weight, targets, upstream, 1.0, 30)
    leaf = hidden.clone().requires_grad_()
    head_logprobs_entropies(leaf, weight, targets)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, hidden_gradient, **EXACT)
    leaf = weight.clone().requires_grad_()
    head_logprobs_entropies(hidden, leaf, targets)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, weight_gradient, **EXACT)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["plain", "tiles"])
def test_head_in_bfloat16_is_as_exact_as_its_inputs(backend):
    hidden = random(16, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = random(40, 32, seed=2, dtype=torch.bfloat16).requires_grad_()
    targets, upstream = torch.arange(16), random(2, 16, seed=3)
    expected = head_reference(hidden.detach(), weight.detach(), targets, upstream, 1.0, 40)
    outputs = head_logprobs_entropies(hidden, weight, targets, backend=backend)
    # Inputs widened to float32: products of 32 terms near 30 are off by 1e-5 at most.
    torch.testing.assert_close(torch.stack(outputs).double(), expected[0], rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((torch.stack(outputs) * upstream).sum(), (hidden, weight))
    for actual, wanted in zip(gradients, expected[1:], strict=True):
        # The slopes are rounded to bfloat16 (2^-9), and so are the results, once a tile.
        assert (actual.double() - wanted).norm() < 6e-3 * wanted.norm()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_confident_token_keeps_its_gradient_in_bfloat16(temperature):
    """A logit near 40 would be rounded to a multiple of 0.25; less the normaliser it is near log 1 = 0."""
    hidden, weight = 3 * random(16, 32, seed=1, dtype=torch.bfloat16), random(40, 32, seed=20, dtype=torch.bfloat16)
    targets = (hidden @ weight.T).argmax(1)
    upstream = random(2, 16, seed=3)
    expected = head_reference(hidden, weight, targets, upstream, temperature, 40)
    assert expected[0][0].max() > -0.05, "no token is confident"
    hidden.requires_grad_()
    outputs = torch.stack(head_logprobs_entropies(hidden, weight, targets, temperature=temperature, backend="tiles"))
    (gradient,) = torch.autograd.grad((outputs * upstream).sum(), hidden)
    error = (gradient.double() - expected[1]).norm() / expected[1].norm()
    # Rounding of slopes, tiles' sums and results, and of log p near -5: 2^-9 each, and five times that.
    assert error < 1e-2
    # The same from logits that were rounded to bfloat16.
    rounded = torch.stack(full((hidden @ weight.T).double(), targets, temperature))
    (gradient,) = torch.autograd.grad((rounded * upstream).sum(), hidden)
    assert error < 0.25 * (gradient.double() - expected[1]).norm() / expected[1].norm()


@pytest.mark.usefixtures("small_tiles")
def test_an_unused_entropy_costs_nothing_and_ranks_speak_once():
    seen: list[Tensor | None] = []
    calls: list[tuple[int, ...]] = []
    eager = eager_passes()

    def slopes(out, logits, columns, upstream, scale):
        seen.append(upstream.v_R)
        eager.slopes(out, logits, columns, upstream, scale)

    def gather(group, tensor):
        calls.append(tuple(tensor.shape))
        return tensor.detach()[None]

    hidden, weight = random(6, 5).requires_grad_(), random(30, 5, seed=1).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab, "gather_over", gather)
        shard = VocabShard(0, 30, 1.0, None, 8, TilePasses(eager.sums, slopes))
        HeadLogprobs.apply(hidden, weight, torch.arange(6), shard, None)[0].sum().backward()
    assert seen == [None] * 4
    assert calls == [(4, 6)]


def test_mixed_types_and_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="cast one of them"):
        head_logprobs_entropies(random(2, 3), random(4, 3, dtype=torch.float32), torch.tensor([0, 1]))
    monkeypatch.setenv(head.BACKEND_VARIABLE, "tils")
    with pytest.raises(ConfigError, match="MEGATRON_RL_HEAD=tils is not a backend"):
        head_logprobs_entropies(random(2, 3), random(4, 3), torch.tensor([0, 1]))


def test_choice_of_the_backend(monkeypatch):
    monkeypatch.delenv(head.BACKEND_VARIABLE, raising=False)
    assert choose_backend("auto", "cpu", num_tiles=1) == "tiles"
    assert choose_backend("auto", "cpu", num_tiles=2) == ("tiles+compile" if compiler_found("cpu") else "tiles")
    assert choose_backend("plain", "cpu", num_tiles=2) == "plain"
    monkeypatch.setenv(head.BACKEND_VARIABLE, "tiles")
    assert choose_backend("auto", "cpu", num_tiles=2) == "tiles"
    monkeypatch.setattr(head, "compiler_found", lambda device_type: False)
    monkeypatch.delenv(head.BACKEND_VARIABLE)
    assert choose_backend("auto", "cpu", num_tiles=2) == "tiles"
    assert describe_backend("cpu").startswith("tiles, eager; bfloat16 products ")


@pytest.mark.usefixtures("small_tiles")
def test_a_compiler_that_fails_leaves_the_eager_passes(monkeypatch, caplog):
    class Failed(BackendCompilerFailed):
        def __init__(self):
            RuntimeError.__init__(self, "no such instruction")

    def broken(function, **options):
        def call(*args):
            raise Failed

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(head, "compiled_passes", compiled_passes.__wrapped__)
    hidden, weight, targets = random(6, 5), random(30, 5, seed=1), torch.arange(6)
    found = head_logprobs_entropies(hidden, weight, targets, backend="tiles+compile")
    assert "runs eagerly" in caplog.text
    expected = head_logprobs_entropies(hidden, weight, targets, backend="tiles")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.processes
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", SIZES)
def test_head_on_tensor_ranks_gives_the_whole_and_partial_gradients(size):
    """27 tokens padded to 40: on four ranks of 10 the last one holds nothing but padding, and its neighbour some."""
    hidden, weight = random(6, 5, seed=1), random(40, 5, seed=2)
    targets, upstream = torch.tensor([0, 26, 7, 9, 10, 20]), random(2, 6, seed=3)
    outputs, hidden_gradient, weight_gradient = head_reference(hidden, weight, targets, upstream, 0.6, 27)

    def on_rank():
        results = []
        for backend in ("plain", "tiles"):
            mine, shard = hidden.clone().requires_grad_(), weight.chunk(size)[dist.get_rank()].clone().requires_grad_()
            found = torch.stack(
                head_logprobs_entropies(
                    mine, shard, targets, temperature=0.6, group=dist.group.WORLD, vocab_size=27, backend=backend
                )
            )
            (found * upstream).sum().backward()
            results.append((found.detach(), gradient_of(mine), gradient_of(shard)))
        nothing = head_logprobs_entropies(mine[:0], shard, targets[:0], group=dist.group.WORLD, backend="tiles")
        assert nothing[0].shape == (0,)
        return results

    ranks = run_ranks(on_rank, size)
    for i in (0, 1):
        for result in ranks:
            torch.testing.assert_close(result[i][0], outputs, **EXACT)
        torch.testing.assert_close(torch.stack([result[i][1] for result in ranks]).sum(0), hidden_gradient, **EXACT)
        torch.testing.assert_close(torch.cat([result[i][2] for result in ranks]), weight_gradient, **EXACT)


@pytest.mark.processes
@pytest.mark.skipif(not compiler_found("cpu"), reason="torch.compile needs a C++ compiler")
@pytest.mark.usefixtures("small_tiles")
def test_compiled_tiles_equal_the_definition_and_the_eager_ones():
    hidden, weight = random(6, 5, seed=1).requires_grad_(), random(30, 5, seed=2).requires_grad_()
    targets, upstream = torch.tensor([0, 26, 7, 8, 15, 16]), random(2, 6, seed=3)
    expected = head_reference(hidden.detach(), weight.detach(), targets, upstream, 0.6, 27)
    outputs = head_logprobs_entropies(hidden, weight, targets, temperature=0.6, vocab_size=27, backend="tiles+compile")
    gradients = torch.autograd.grad((torch.stack(outputs) * upstream).sum(), (hidden, weight))
    torch.testing.assert_close((torch.stack(outputs).detach(), *gradients), expected, **EXACT)

    hidden, weight = (tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in (hidden, weight))
    results = []
    for backend in ("tiles", "tiles+compile"):
        outputs = torch.stack(head_logprobs_entropies(hidden, weight, targets, backend=backend))
        results.append((outputs.detach(), *torch.autograd.grad((outputs * upstream).sum(), (hidden, weight))))
    # Sums of 30 terms in another order; a slope on the edge between two bfloat16 may fall to either side (2^-8).
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=2**-7, atol=2**-8)


@pytest.mark.processes
@pytest.mark.skipif(not compiler_found("cpu"), reason="torch.compile needs a C++ compiler")
def test_tiles_are_compiled_although_the_cpu_replacements_disable_compilation():
    """In a process of its own: the replacements disable compilation for the rest of the process."""
    program = (
        "import torch\n"
        "from megatron_rl.distributed import cpu\n"
        "cpu.activate()\n"
        "from megatron_rl.ops.tiles import compiled_passes\n"
        "from torch._dynamo.utils import counters\n"
        "compiled_passes('cpu').sums(torch.zeros(4, 8), torch.tensor(1.0))\n"
        "assert counters['frames'] == {'total': 1, 'ok': 1}, counters['frames']\n"
        "torch.compile(lambda x: x + 1)(torch.zeros(3))\n"
        "assert counters['frames']['ok'] == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
