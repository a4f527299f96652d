"""The shipped configs: parameter counts, a plan that fits, a Slurm script with each objective."""

from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError
from megatron_rl.launch.planning.estimate import estimate_run, planned_ranks
from megatron_rl.launch.planning.memory import GIB, fullest
from megatron_rl.launch.planning.parameters import active_parameters, total_parameters
from megatron_rl.launch.planning.run_plan import make_plan
from megatron_rl.launch.slurm.render import render, servers_per_node
from megatron_rl.models.hf_mapping import family_of, read_hf_config

CONFIGS = Path(__file__).parents[3] / "configs"
MODELS = sorted((CONFIGS / "models").glob("*.toml"), key=lambda path: path.name)
OBJECTIVES = ("grpo", "gspo", "sapo", "sspo", "espo")
H100 = CONFIGS / "cluster" / "h100-80gb.toml"

BILLIONS = {
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "glm-4.5-air": (106, 12),
    "glm-4.5": (355, 32),
    "deepseek-v3": (671, 37),
    "moonlight-16b-a3b": (16, 3),
    "gpt-oss-120b": (117, 5.1),
    "kimi-k2": (1040, 32),
}
"""Published parameter counts, in billions: total, and active per token."""


def each_model():
    return pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


@pytest.mark.parametrize("name", BILLIONS)
def test_parameter_counts_equal_the_published_ones(name):
    """The published numbers are rounded; those of GLM-4.5 and Kimi-K2 include multi-token prediction (2 %).

    Some published active counts include the embedding table, of which a token reads one row.
    """
    hf = read_hf_config(CONFIGS / "shapes" / name)
    family = family_of(hf)
    total, active = (count * 1e9 for count in BILLIONS[name])
    assert total_parameters(family) == pytest.approx(total, rel=0.02)
    table = hf["vocab_size"] * hf["hidden_size"]
    assert active_parameters(family) - 2 * table <= 1.05 * active
    assert active_parameters(family) >= 0.95 * active


def test_every_shape_has_a_config():
    assert {path.name for path in (CONFIGS / "shapes").iterdir()} == set(BILLIONS)
    used = {Path(load(Run, [path]).run.model.path).name for path in MODELS}
    assert used == set(BILLIONS)


@pytest.mark.processes
@each_model()
def test_a_shipped_config_fits_and_lists_missing_inputs(path, capsys):
    sizes = estimate_run(load(Run, [path, H100]))
    assert sizes is not None
    assert sizes.memory_bytes is not None
    assert fullest(sizes.memories).total < 0.95 * sizes.memory_bytes
    assert main(["check", str(path), str(H100)]) == 2
    output = capsys.readouterr().out
    assert output.startswith("fits: a rank needs")
    assert "peak" in output
    assert "DOES NOT FIT" not in output
    assert "Layouts that fit" in output
    for missing in ("no *.safetensors in", "no such file", "no tokenizer in"):
        assert missing in output


@pytest.mark.processes
@each_model()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_shipped_config_loads_and_renders_with_each_objective(path, objective, tmp_path, capsys):
    files = [path, CONFIGS / "objective" / f"{objective}.toml"]
    words = [f"log.path={tmp_path / 'run'}"]
    loaded = load(Run, files, words)
    assert loaded.run.objective.name == objective
    sizes = estimate_run(loaded)
    assert sizes is not None
    assert sizes.layout.ranks == loaded.run.slurm.nodes * 8
    assert sizes.work.fused
    script = render(loaded, [*map(str, files), *words], tmp_path, starts_here=False)
    assert f"#SBATCH --nodes={loaded.run.slurm.nodes}" in script
    assert "no weights" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        make_plan(loaded, planned_ranks(loaded), on_gloo=False)


@each_model()
def test_a_server_of_the_job_can_hold_the_model(path):
    run = load(Run, [path]).run
    if run.rollout.urls:  # larger than a node: started by others
        return
    gpus = run.slurm.gpus_per_node // servers_per_node(run)
    assert run.rollout.sglang["tp_size"] == gpus
    weights = 2 * total_parameters(family_of(read_hf_config(Path(run.model.path))))
    # a seventh and more is left for keys and values
    assert weights / gpus < 0.85 * float(run.rollout.sglang["mem_fraction_static"]) * 80 * GIB
