"""The estimates of ``check``: arithmetic against numbers computed by hand, memory against a measured step."""

from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.memory_plan import CATEGORIES, Case, compare
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.launch.planning.activations import head_working, in_flight
from megatron_rl.launch.planning.estimate import estimate_run
from megatron_rl.launch.planning.layout import ParallelLayout, check_layout, layout_of
from megatron_rl.launch.planning.memory import stage_memory
from megatron_rl.launch.planning.microbatch import MicrobatchWork, full_microbatch
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.launch.planning.saved_activations import layer_bytes
from megatron_rl.launch.planning.stages import pipeline_stages
from megatron_rl.launch.planning.step_cost import cache_per_token, pipeline_bubble, rank_traffic, step_cost
from megatron_rl.launch.planning.suggest import suggest
from megatron_rl.models.hf_mapping import family_of

pytestmark = pytest.mark.usefixtures("one_thread")

HF = {
    "model_type": "qwen3_moe",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 2,
    "mlp_only_layers": [0],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
"""Two layers of width 4: one dense (width 6), one of 4 experts (width 2), two per token."""

MODULES = "model.megatron.recompute_modules"
OLD = version("megatron-core") < "0.18"
CONFIGS = Path(__file__).parents[3] / "configs"
FAMILY = family_of(HF)


def run_of(*words: str) -> Run:
    return load(Run, [], ["model.path=x", *words]).run


def layout(*words: str, ranks: int | None = None) -> ParallelLayout:
    run = run_of(*words)
    return layout_of(run.parallel, ranks, run.model.megatron)


@pytest.mark.processes
@pytest.mark.parametrize(
    "case",
    [
        Case("qwen3_moe", ("model.dtype=bfloat16", "parallel.tensor=2", "parallel.expert=2"), 2),
        pytest.param(
            Case("deepseek_v3", ("model.dtype=bfloat16", "model.recompute=full")),
            marks=pytest.mark.skipif(OLD, reason="the plan is for megatron-core 0.18 and later, which pad values"),
        ),
        Case("qwen3_moe", ("model.dtype=bfloat16", "model.recompute=selective", f"{MODULES}=['core_attn','moe']")),
    ],
    ids=lambda case: case.name,
)
def test_measured_memory_is_within_10_percent_of_the_estimate(case):
    """The estimate leaves out small temporaries and assumes balanced routers, hence the tolerance."""
    for plan, seen in compare(case):
        for category in CATEGORIES:
            assert getattr(plan, category) == pytest.approx(getattr(seen, category), rel=0.1), category


def test_weights_gradients_and_optimizer_by_hand():
    """Two expert ranks, bfloat16: 2 + 4 bytes per parameter, and 12 sharded over the replicas."""
    run = run_of("model.dtype=bfloat16", "parallel.expert=2", "parallel.ranks=4")
    sizes = layout_of(run.parallel, 4)
    (memory,) = stage_memory(run, FAMILY, sizes, full_microbatch(run, 16, fused=True), microbatches=1)
    dense = 10 * 4 * 2 + 4 + 2 * (4 * 12 + 6 * 4 + 6 + 8) + 3 * 4 * 6 + 4 * 4
    expert = 2 * 3 * 4 * 2
    assert (memory.counts.dense, memory.counts.expert) == (dense, expert)
    assert (memory.parameters, memory.gradients) == (2 * (dense + expert), 4 * (dense + expert))
    assert memory.optimizer == 12 * (dense // 4 + expert // 2)


@pytest.mark.parametrize(
    ("words", "device", "host"),
    [
        ((), 12, 0),
        (("use_precision_aware_optimizer=true", "exp_avg_dtype='bfloat16'"), 2 + 2 + 4, 0),
        (("use_precision_aware_optimizer=true", "store_param_remainders=false"), 12, 0),
        (("optimizer_cpu_offload=true", "optimizer_offload_fraction=1.0"), 4, 8 + 4 + 4),
        (("optimizer_cpu_offload=true", "optimizer_offload_fraction=0.5"), 8, 8),
    ],
)
def test_optimizer_bytes_per_parameter_by_hand(words, device, host):
    run = run_of("model.dtype=bfloat16", *(f"optimizer.megatron.{word}" for word in words))
    work = full_microbatch(run, 16, fused=True)
    (memory,) = stage_memory(run, FAMILY, layout_of(run.parallel, 1), work, microbatches=1)
    assert memory.optimizer == pytest.approx(device * memory.counts.total, abs=8)
    assert memory.host_optimizer == pytest.approx(host * memory.counts.total, abs=16)


def test_muon_has_one_momentum_per_matrix_by_hand():
    run = run_of("optimizer.megatron.optimizer='muon'", "parallel.distributed_optimizer=false")
    (memory,) = stage_memory(run, FAMILY, layout(), full_microbatch(run, 16, fused=False), microbatches=1)
    norms = 2 * (2 * 4 + 2 * 3) + 4
    ends = 2 * 10 * 4
    assert memory.counts.not_matrices == norms + ends
    assert memory.optimizer == 4 * memory.counts.total + 4 * (norms + ends)


def test_recomputed_modules_save_their_input_by_hand():
    """bfloat16 on a GPU, 8 tokens of width 4: experts and norms are recomputed, attention is not."""
    sizes = model_sizes(FAMILY)
    work = MicrobatchWork(tokens=8, longest=8, trained=8, dtype_bytes=2, expert_imbalance=1.0, fused=True)
    everything = layer_bytes(sizes, layout(), work, sparse=True)
    without = layer_bytes(sizes, layout(), work, sparse=True, recomputed=frozenset(("moe", "layernorm")))
    attention = 2 * 8 * 4 + 4 * 8 * 3 * 2 + 8 * 3 * (2 * 3 + 4) + 2 * 8 * 3 * (2 * 2 + 2 * 1) + 4 * 8 * 2
    assert without == attention + 2 * 8 * 4
    assert everything > 2 * without


def test_saved_bytes_of_a_dense_layer_by_hand():
    """float32 on one rank, 5 tokens, heads of 3: two of queries, one of keys and values."""
    work = MicrobatchWork(tokens=5, longest=5, trained=5, dtype_bytes=4, expert_imbalance=1.0, fused=False)
    norms = 2 * (2 * 4 + 1)
    attention = 4 + 4 * 3 + (2 + 1) * (2 * 3 + 1) + (2 + 2) * 3 - 3 + 4 * 2 * 3 + 2 + 2 * 3
    network = 4 + 5 * 6
    assert layer_bytes(model_sizes(FAMILY), layout(), work, sparse=False) == 4 * 5 * (norms + attention + network)


def test_saved_bytes_of_a_mixture_layer_by_hand():
    """bfloat16 with transformer-engine, two expert ranks, the busiest with 1.5 times the average."""
    work = MicrobatchWork(tokens=8, longest=8, trained=8, dtype_bytes=2, expert_imbalance=1.5, fused=True)
    norms = 2 * 8 * (2 * 4 + 4)
    attention = 2 * 8 * 4 + 4 * 8 * 3 * 2 + 8 * 3 * (2 * 3 + 4) + 2 * 8 * 3 * (2 * 2 + 2 * 1) + 4 * 8 * 2
    router = 2 * 8 * 4 + 8 * 5 * 4 + 20 * 8 * 2
    experts = 1.5 * 8 * 2 * (2 * (4 + 6 * 2) + 4)
    back = 8 * 2 * 4 * 2
    kept = layer_bytes(model_sizes(FAMILY), layout("parallel.expert=2"), work, sparse=True)
    assert kept == norms + attention + router + experts + back


def test_full_recomputation_saves_layer_inputs_and_one_layer():
    run = run_of("model.recompute=full")
    work = MicrobatchWork(tokens=8, longest=8, trained=8, dtype_bytes=4, expert_imbalance=1.0, fused=False)
    (memory,) = stage_memory(run, FAMILY, layout(), work, microbatches=1)
    assert memory.activations.saved == 2 * 8 * 4 * 4
    assert memory.activations.working > layer_bytes(model_sizes(FAMILY), layout(), work, sparse=True)


def test_the_vocabulary_operation_never_stores_all_logits():
    """Doubling the vocabulary adds gradients of the weight but no logits: only a tile of them exists."""
    work = MicrobatchWork(tokens=4096, longest=4096, trained=4096, dtype_bytes=2, expert_imbalance=1.0, fused=True)
    small = model_sizes(family_of({**HF, "vocab_size": 1 << 17}))
    large = model_sizes(family_of({**HF, "vocab_size": 1 << 18}))
    more = head_working(large, layout(), work) - head_working(small, layout(), work)
    assert more <= (1 << 17) * 4 * 2


@pytest.mark.parametrize(
    ("words", "rows", "flights"),
    [
        ((), 9, [1]),
        (("parallel.pipeline=4",), 9, [4, 3, 2, 1]),
        (("parallel.pipeline=4",), 2, [2, 2, 2, 1]),
        (("parallel.pipeline=4", "parallel.virtual_pipeline=2"), 8, [11, 9, 7, 5]),
        (("parallel.pipeline=4", "parallel.virtual_pipeline=2"), 4, [8, 8, 7, 5]),
    ],
)
def test_micro_batches_in_flight(words, rows, flights):
    sizes = layout(*words)
    assert [in_flight(sizes, stage, rows) for stage in pipeline_stages(8, sizes)] == flights


def test_flops_and_bytes_of_a_step_by_hand():
    """Six sequences of 3 + 5 tokens: layers of 76 + 72 and 76 + 16 + 48 parameters per token (norms included)."""
    run = run_of("train.prompts_per_step=3", "train.group_size=2", "model.recompute=full", "model.dtype=bfloat16")
    step = step_cost(run, FAMILY, longest=8, prompt=3)
    attention_weights, norms = 4 * 12 + 6 * 4 + 6, 8
    layers = 2 * (2 * (attention_weights + norms) + 72 + 16 + 48 + 4)
    attention = 2 * 2 * (3 + 3) * 4 * 2
    head = 2 * 4 * 10
    assert step.tokens == 48
    assert step.logprob_flops == 48 * (layers + attention) + 30 * head
    assert step.train_flops == 48 * 4 * (layers + attention) + 30 * 4 * head
    assert step.generate_flops == 6 * (8 * (layers + attention) + 5 * head)
    assert cache_per_token(model_sizes(FAMILY), 2) == 1 * (3 + 3) * 2
    assert step.cache_bytes == 48 * 12 * 2
    assert step.decode_bytes(2) == 5 * 2 * step.weight_bytes + 5 * 6 * 24 * 5.5


def test_bytes_that_a_rank_sends_by_hand():
    run = run_of("parallel.expert=2", "model.dtype=bfloat16", "model.recompute=full")
    sizes = layout_of(run.parallel, 2)
    work = MicrobatchWork(tokens=8, longest=8, trained=8, dtype_bytes=2, expert_imbalance=1.0, fused=True)
    sent = rank_traffic(run, FAMILY, sizes, work, microbatches=3)
    dense = 84 + 2 * (48 + 24 + 6 + 8) + 72 + 16
    assert sent.expert == 2 * 3 * 4 * 1 * 8 * 2 * 4 * 2 / 2
    assert (sent.tensor, sent.pipeline) == (0, 0)
    assert sent.data == 6 * dense / 2


def test_the_bubble_shrinks_with_more_micro_batches_and_more_chunks():
    assert pipeline_bubble(layout(), 4) == 0
    assert pipeline_bubble(layout("parallel.pipeline=4"), 9) == pytest.approx(3 / 12)
    assert pipeline_bubble(layout("parallel.pipeline=4", "parallel.virtual_pipeline=3"), 9) == pytest.approx(1 / 10)


def test_suggested_layouts_are_valid_and_fit():
    loaded = load(Run, [CONFIGS / "models" / "qwen3-30b-a3b-2nodes.toml", CONFIGS / "cluster" / "h100-80gb.toml"])
    sizes = estimate_run(loaded)
    assert sizes is not None
    assert sizes.memory_bytes is not None
    found = suggest(loaded, sizes.family, sizes.sizes, 16, sizes.memory_bytes)
    assert len(found) > 20
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    for each in found[:10]:
        again = load(Run, [], [f"model.path={loaded.run.model.path}", "parallel.ranks=16", *each.words])
        assert check_layout(again, each.layout, model_sizes(sizes.family), on_gloo=False) == []
        assert layout_of(again.run.parallel, 16, again.run.model.megatron) == each.layout
        assert each.bytes < sizes.memory_bytes


def test_without_a_fitting_layout_nothing_is_suggested():
    loaded = load(Run, [CONFIGS / "models" / "deepseek-v3-32nodes.toml", CONFIGS / "cluster" / "h100-80gb.toml"])
    sizes = estimate_run(loaded)
    assert sizes is not None
    assert sizes.memory_bytes is not None
    assert suggest(loaded, sizes.family, sizes.sizes, 64, sizes.memory_bytes) == []
