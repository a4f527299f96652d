"""Attention over packed rows: both paths against one sequence at a time; and which path is taken when."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.policy import attention, backends
from megatron_rl.policy.attention import AttentionOptions, bucketed_attention, varlen_attention
from megatron_rl.policy.rows import AttentionBucket, PackedRow
from tests.policy.plain_attention import causal, plain_varlen

LENGTHS = (5, 1, 12, 4)
FILLER = 3


def row() -> PackedRow:
    """Return a row of four sequences in three buckets, with filler at its end."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    buckets: list[AttentionBucket] = []
    flat, used = torch.full((sum(LENGTHS) + FILLER,), -1), 0
    for members in ([1], [0, 3], [2]):
        width = max(LENGTHS[n] for n in members)
        index = torch.zeros(len(members), width, dtype=torch.int64)
        for place, n in enumerate(members):
            index[place, : LENGTHS[n]] = torch.arange(starts[n], starts[n] + LENGTHS[n])
            flat[starts[n] : starts[n] + LENGTHS[n]] = used + place * width + torch.arange(LENGTHS[n])
        used += len(members) * width
        buckets.append(AttentionBucket(index, index, None))
    ends = torch.tensor([*starts, sum(LENGTHS)], dtype=torch.int32)
    return PackedRow(
        buckets=buckets,
        output_index_T=torch.where(flat < 0, used, flat),
        sequence_ends=ends,
        num_tokens=sum(LENGTHS),
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )


def buckets(query: Tensor, key: Tensor, value: Tensor, packed: PackedRow, scale: float | None) -> Tensor:
    """Stand where ``varlen_attention`` stands."""
    return bucketed_attention(query, key, value, packed, AttentionOptions(scale))


@pytest.mark.parametrize("path", [buckets, varlen_attention], ids=["buckets", "varlen"])
@pytest.mark.parametrize(
    ("groups", "value_width", "scale"), [(4, 8, None), (2, 8, 0.3), (4, 6, 0.3)], ids=["full", "grouped", "latent"]
)
def test_both_paths_attend_as_one_sequence_at_a_time(path, groups, value_width, scale, monkeypatch) -> None:
    # The kernel runs on GPUs only; this one takes the same arguments, so that they can be checked.
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS) + FILLER
    shapes = ((total, 4, 8), (total, groups, 8), (total, groups, value_width))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out_TND = path(*inputs, row(), scale)
    queries, keys, values = (tensor.split([*LENGTHS, FILLER]) for tensor in inputs)
    alone = [causal(q, k, v, scale) for q, k, v in zip(queries, keys, values, strict=True)]
    expected = torch.cat(alone)
    expected = expected * (torch.arange(total) < sum(LENGTHS))[:, None, None]
    torch.testing.assert_close(out_TND, expected)

    upstream = torch.randn(out_TND.shape, generator=generator, dtype=torch.float64)
    found, truth = (torch.autograd.grad(out, inputs, upstream) for out in (out_TND, expected))
    for gradient, other in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, other)


def test_repeated_heads_give_what_shared_ones_give(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(LENGTHS) + FILLER, heads, 8) for heads in (4, 2, 2))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    sinks_A = torch.randn(4, generator=generator)
    kinds = (AttentionOptions(), AttentionOptions(sinks_A=sinks_A))
    shared = [bucketed_attention(query, key, value, row(), kind) for kind in kinds]
    monkeypatch.setattr(attention, "_takes_groups", lambda *_: False)
    for kind, before in zip(kinds, shared, strict=True):
        torch.testing.assert_close(bucketed_attention(query, key, value, row(), kind), before)


@pytest.mark.parametrize("order", ["plain", "masked"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, True), *((window, sinks) for window in (1, 3, 40) for sinks in (False, True))]
)
def test_sinks_and_windows_are_the_softmax_written_out(
    order: str, groups: int, window: int | None, sinks: bool
) -> None:
    """``masked`` is the order that context parallelism gives, here with all keys on one rank."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS) + FILLER
    shapes = ((total, 4, 8), (total, groups, 8), (total, groups, 8), (4,))
    query, key, value, sinks_A = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    packed = row() if order == "plain" else masked(row())
    kind = AttentionOptions(0.3, window, sinks_A if sinks else None)
    out_TND = bucketed_attention(query, key, value, packed, kind)
    queries, keys, values = (tensor.split([*LENGTHS, FILLER]) for tensor in (query, key, value))
    parts = zip(queries, keys, values, strict=True)
    alone = [causal(q, k, v, 0.3, window=window, sinks_A=kind.sinks_A) for q, k, v in parts]
    expected = torch.cat(alone) * (torch.arange(total) < sum(LENGTHS))[:, None, None]
    torch.testing.assert_close(out_TND, expected)

    upstream = torch.randn(out_TND.shape, generator=generator, dtype=torch.float64)
    leaves = [query, key, value, *([sinks_A] if sinks else [])]
    found, truth = (torch.autograd.grad(out, leaves, upstream) for out in (out_TND, expected))
    for gradient, other in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, other)


def masked(plain: PackedRow) -> PackedRow:
    """Return the same row with masks in place of plain causal order."""
    made: list[AttentionBucket] = []
    for bucket in plain.buckets:
        count, longest = bucket.key_index_BS.shape
        order_SS = torch.ones(longest, longest, dtype=torch.bool).tril()
        made.append(AttentionBucket(bucket.query_index_BS, bucket.key_index_BS, order_SS.expand(count, 1, -1, -1)))
    return replace(plain, buckets=made)


def test_a_row_without_tokens_has_a_gradient_for_its_sinks() -> None:
    tensor = torch.zeros(2, 4, 8, requires_grad=True)
    sinks_A = torch.zeros(4, requires_grad=True)
    empty = PackedRow(output_index_T=torch.zeros(2, dtype=torch.int64))
    bucketed_attention(tensor, tensor, tensor, empty, AttentionOptions(sinks_A=sinks_A)).sum().backward()
    assert sinks_A.grad is not None
    assert not sinks_A.grad.any()


def test_what_serves_follows_from_device_type_and_packages(monkeypatch) -> None:
    installed = {"triton", "torch.nn.attention.varlen"}
    monkeypatch.setattr(backends, "_found", installed.__contains__)
    plain = backends.backends_for(torch.bfloat16, "cpu")
    assert plain == backends.Backends(engine=False, varlen=False, grouped=True, fused=False, accumulates=False)
    without = backends.backends_for(torch.bfloat16, "cuda")
    assert without == backends.Backends(engine=False, varlen=True, grouped=True, fused=True, accumulates=False)
    assert not backends.backends_for(torch.float32, "cuda").varlen
    installed.add("transformer_engine")
    assert backends.backends_for(torch.bfloat16, "cuda").engine
    assert not backends.backends_for(torch.float32, "cuda").engine, "its attention takes packed rows in 16 bits only"
    monkeypatch.setenv(backends.PLAIN_VARIABLE, "engine, attention,experts,fusion")
    assert backends.backends_for(torch.bfloat16, "cuda") == backends.Backends(False, False, False, False, False)


def test_an_unknown_part_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(backends.PLAIN_VARIABLE, "atention")
    with pytest.raises(ConfigError, match="atention; write some of engine, attention"):
        backends.backends_for(torch.float32, "cpu")


def test_every_part_is_told_in_words() -> None:
    for engine in (False, True):
        told = backends.describe_backends(backends.Backends(engine, not engine, not engine, True, False), "cuda")
        assert ("transformer-engine" in told["attention"]) == engine
        assert all(told.values())
