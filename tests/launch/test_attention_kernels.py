"""What ``check`` says about the attention kernels of a run on GPUs."""

import pytest

from megatron_rl.config.schema import Run
from megatron_rl.launch.planning import attention
from megatron_rl.launch.planning.attention import attention_problems, attention_shapes, describe_attention
from megatron_rl.launch.planning.layout import layout_of
from megatron_rl.launch.planning.model_sizes import ModelSizes
from megatron_rl.policy.engine_attention import AttentionShape

SIZES = ModelSizes(
    layers=4,
    hidden=512,
    vocabulary=100,
    positions=4096,
    heads=8,
    kv_heads=4,
    query_dim=64,
    value_dim=64,
    rotary_dim=64,
    nope_dim=0,
    query_rank=0,
    latent_rank=0,
    qk_norm=False,
    attention_sinks=True,
    window=128,
    windowed_layers=2,
    ffn=1024,
    has_dense_layers=True,
    experts=0,
    experts_per_token=0,
    expert_ffn=0,
    shared_ffn=0,
    experts_have_bias=False,
    sigmoid_router=False,
)


def run(**train: object) -> Run:
    model = {"path": "model", "dtype": "bfloat16"}
    parallel = {"tensor": 2, "context": 2}
    settings = {"model": model, "parallel": parallel, "train": {"tokens_per_microbatch": 4096, **train}}
    return Run.model_validate(settings)


def shapes(configured: Run) -> list[AttentionShape]:
    return [shape for _, shape in attention_shapes(configured, layout_of(configured.parallel), SIZES, 1000)]


def test_each_kind_of_layer_is_asked_about() -> None:
    full, windowed = shapes(run())
    assert (full.window, windowed.window) == (0, 128)
    assert (full.heads, full.kv_heads, full.sequences, full.tokens) == (4, 2, 5, 4096)
    assert full.exchange == "a2a"


def test_unfused_attention_saves_two_shares_per_pair_of_tokens() -> None:
    assert shapes(run())[0].unfused_bytes == 2 * 2 * 5 * 4 * 1000**2


@pytest.mark.parametrize(("setting", "expected"), [({}, False), ({"deterministic": True}, True)])
def test_gpus_are_deterministic_only_if_asked(setting: dict[str, object], expected: bool) -> None:
    assert all(shape.deterministic is expected for shape in shapes(run(**setting)))


@pytest.mark.parametrize(
    ("kernel", "text"),
    [("fused", "cuDNN's fused attention"), ("unfused", "0.1 GiB per layer"), (None, "deterministic = false")],
)
def test_the_selected_kernel_is_said(monkeypatch: pytest.MonkeyPatch, kernel: str | None, text: str) -> None:
    monkeypatch.setattr(attention, "why_not_asked", lambda: None)
    monkeypatch.setattr(attention, "selected_kernel", lambda shape: kernel)
    configured = run()
    layout = layout_of(configured.parallel)
    lines = list(describe_attention(configured, layout, SIZES, 1000))
    assert len(lines) == 2
    assert all(text in line for line in lines)
    assert len(list(attention_problems(configured, layout, SIZES, 1000))) == (2 if kernel is None else 0)


def test_without_a_gpu_it_says_that_it_did_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    configured = run()
    (line,) = describe_attention(configured, layout_of(configured.parallel), SIZES, 1000)
    assert "was not asked" in line
