"""Parameter counts per rank, compared with the model chunks that megatron-core builds."""

import json
from pathlib import Path

import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.distributed.mesh import start_world
from megatron_rl.launch.planning.layout import check_layout, layout_of
from megatron_rl.launch.planning.model_sizes import model_sizes
from megatron_rl.launch.planning.parameters import active_parameters, parameter_counts, total_parameters
from megatron_rl.launch.planning.stages import pipeline_stages
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.policy.model import build_chunks
from megatron_rl.policy.process_groups import build_mesh
from megatron_rl.policy.upstream import repair
from tests.launch.planning.test_estimate import HF
from tests.policy import families
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tensor and its experts": (2, ("parallel.tensor=2",)),
    "tensor and expert": (2, ("parallel.tensor=2", "parallel.expert=2")),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "interleaved": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "pipeline and expert": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "uneven pipeline": (2, ("parallel.pipeline=2", "model.megatron.num_layers_in_first_pipeline_stage=1")),
}
DENSE = ["one rank", "tensor and its experts", "pipeline", "interleaved", "uneven pipeline"]


def write_config(name: str, folder: Path) -> Path:
    model_type, settings = families.MODELS[name]
    rope = {} if "rope_parameters" in settings else {"rope_theta": 10000.0}
    hf = {**families.COMMON, "rms_norm_eps": 1e-6, **rope, **settings, "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def counts(folder: str, words: tuple[str, ...]) -> tuple[int, int, int]:
    """Return this rank's pipeline stage, its dense parameters and its expert parameters."""
    repair()
    run = load(Run, [], [f"model.path={folder}", *words]).run
    mesh = build_mesh(run, start_world(60, deterministic=True))
    family = family_of(read_hf_config(Path(folder)))
    parameters = [p for chunk in build_chunks(run, family, mesh) for p in chunk.parameters()]
    dense = sum(p.numel() for p in parameters if getattr(p, "allreduce", True))
    stage = 0 if mesh.pipeline is None else torch.distributed.get_rank(mesh.pipeline)
    return stage, dense, sum(p.numel() for p in parameters) - dense


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "pipeline"),
        ("qwen2", "tensor and its experts"),
        *(("qwen3_moe", layout) for layout in LAYOUTS),
        ("qwen2_moe", "tensor and expert"),
        ("glm4_moe", "pipeline and expert"),
        ("mixtral", "tensor and its experts"),
        ("deepseek_v3", "tensor and its experts"),
        ("deepseek_v3", "tensor and expert"),
        ("deepseek_v3", "interleaved"),
        ("moonlight", "uneven pipeline"),
        ("gpt_oss", "tensor and its experts"),
        ("gpt_oss", "tensor and expert"),
    ],
)
def test_counted_parameters_equal_those_of_the_built_model(name, layout, tmp_path):
    folder = write_config(name, tmp_path)
    ranks, words = LAYOUTS[layout]
    loaded = load(Run, [], [f"model.path={folder}", *words])
    family = family_of(read_hf_config(folder))
    sizes = layout_of(loaded.run.parallel, ranks, loaded.run.model.megatron)
    assert check_layout(loaded, sizes, model_sizes(family), on_gloo=True) == []
    stages = pipeline_stages(family.num_layers, sizes)
    for index, dense, expert in run_ranks(counts, ranks, str(folder), words, initialize=False):
        counted = parameter_counts(family, sizes, stages[index])
        assert (counted.dense, counted.expert) == (dense, expert)


def test_layers_per_stage_equal_megatron_core_s_assignment():
    def layers(*words: str, num_layers: int = 8) -> list[tuple[tuple[int, ...], ...]]:
        run = load(Run, [], ["model.path=x", *words]).run
        return [
            stage.chunks for stage in pipeline_stages(num_layers, layout_of(run.parallel, None, run.model.megatron))
        ]

    assert layers("parallel.pipeline=2") == [((0, 1, 2, 3),), ((4, 5, 6, 7),)]
    assert layers("parallel.pipeline=2", "parallel.virtual_pipeline=2") == [((0, 1), (4, 5)), ((2, 3), (6, 7))]
    first, last = (f"model.megatron.num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
    assert layers("parallel.pipeline=3", f"{first}=1", f"{last}=3") == [((0,),), ((1, 2, 3, 4),), ((5, 6, 7),)]
    assert layers("parallel.pipeline=2", f"{last}=1") == [((0, 1, 2, 3, 4, 5, 6),), ((7,),)]


def test_a_small_model_by_hand(tmp_path):
    """Two layers of width 4: one dense (width 6), one of 4 experts (width 2), two per token."""
    family = family_of(HF)
    attention = 4 * (6 + 3 + 3) + 6 * 4 + 3 + 3
    norms, dense, expert, router = 4 + 4, 3 * 4 * 6, 3 * 4 * 2, 4 * 4
    ends = 10 * 4 * 2 + 4
    assert total_parameters(family) == ends + 2 * (attention + norms) + dense + router + 4 * expert
    assert active_parameters(family) == ends + 2 * (attention + norms) + dense + router + 2 * expert
