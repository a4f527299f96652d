"""Conversion: round trips, reading by megatron-core, resuming after a kill, errors of bad input."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_rl.cli import main
from megatron_rl.convert import to_hf, to_megatron
from megatron_rl.convert.manifest import read_manifest
from megatron_rl.convert.to_hf import OutputFormat
from megatron_rl.convert.verify import compare
from megatron_rl.distributed.mesh import start_world
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.transformer_engine_names import to_local_name
from megatron_rl.policy.backends import PLAIN_VARIABLE
from megatron_rl.policy.engine import Policy
from megatron_rl.policy.hf_weights import shards_of
from tests.policy import families
from tests.policy.families import MODELS
from tests.policy.tiny import run_of
from tests.ranks import run_ranks

CONSOLE = Console(quiet=True)
FORMATS = {"split, float32": (False, torch.float32), "fused, bfloat16": (True, torch.bfloat16)}


def to_core(source: Path, target: Path):
    return to_megatron.convert(source, target, 2, CONSOLE)


def to_hugging_face(source: Path, target: Path, *, fp8: bool = False, split_experts: bool = False):
    return to_hf.convert(source, target, OutputFormat(fp8=fp8, split_experts=split_experts), 2, CONSOLE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("deepseek_v3", tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_the_same_file(tmp_path: Path, name: str, format_: str) -> None:
    fused, dtype = FORMATS[format_]
    source = families.save(name, tmp_path / "hf", dtype, fused=fused)

    manifest = to_core(source, tmp_path / "megatron")
    _, unchanged = to_hugging_face(tmp_path / "megatron", tmp_path / "again")

    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert unchanged == len(manifest.tensors) == len(load_file(source / "model.safetensors"))
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for one, two in ((source, "megatron"), (tmp_path / "megatron", "again")):
        result = compare(one, tmp_path / two, 2, CONSOLE)
        assert result.is_same
        assert result.num_equal >= unchanged


def test_fused_experts_can_be_split(tmp_path: Path) -> None:
    fused = families.save("mixtral", tmp_path / "fused", fused=True)
    split = families.save("mixtral", tmp_path / "split")
    to_core(fused, tmp_path / "megatron")

    to_hugging_face(tmp_path / "megatron", tmp_path / "again", split_experts=True)

    expected, result = load_file(split / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)


def read_by_megatron(folder: str, parallel: dict[str, object]) -> list[str]:
    """Load the checkpoint by megatron-core's reader; return the parameters that differ from ours."""
    policy = Policy(run_of(Path(folder), parallel=parallel), start_world(60, deterministic=True), total_updates=1)
    (chunk,) = policy.chunks
    shards = shards_of(policy.chunks, policy.family, policy.mesh)
    ours = [shard.parameter.detach().clone() for shard in shards]
    for shard in shards:
        shard.parameter.detach().fill_(7)
    module = chunk.module
    state = module.sharded_state_dict(metadata={"non_homogeneous_layers": True, "dp_cp_group": policy.mesh.data})
    state = {name: entry for name, entry in state.items() if "_extra_state" not in name}
    written = {to_local_name(key): key for key in _keys(Path(folder))}
    for entry in state.values():
        entry.key = written[to_local_name(entry.key)]  # the local layers' names for some norms
    module.load_state_dict(dist_checkpointing.load(state, folder), strict=False)
    return [s.name.megatron for s, value in zip(shards, ours, strict=True) if not torch.equal(s.parameter, value)]


def _keys(folder: Path) -> set[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return {key for row in manifest.tensors for key in row.to}


@pytest.mark.processes
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "expert": 2}], ids=["one rank", "tensor and expert"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "llama"])
def test_megatron_reads_it_under_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parallel: dict[str, object]
) -> None:
    monkeypatch.setenv(PLAIN_VARIABLE, "experts")  # megatron-core's experts: ours cannot load its checkpoints
    parallel = parallel if name != "llama" or not parallel else {"tensor": 2}
    to_core(families.save(name, tmp_path / "hf"), tmp_path / "megatron")

    for different in run_ranks(
        read_by_megatron, 2 if parallel else 1, str(tmp_path / "megatron"), parallel, initialize=False
    ):
        assert different == []


def save_by_megatron(folder: str, target: str, parallel: dict[str, object]) -> None:
    """Save the model by megatron-core's writer, which stacks the layers of a dense model."""
    policy = Policy(run_of(Path(folder), parallel=parallel), start_world(60, deterministic=True), total_updates=1)
    state = policy.chunks[0].module.sharded_state_dict(metadata={"dp_cp_group": policy.mesh.data})
    Path(target).mkdir(exist_ok=True)
    torch.distributed.barrier()
    getattr(multiprocessing.current_process(), "_config")["daemon"] = False  # noqa: B009 (its writer starts processes)
    dist_checkpointing.save(state, target)
    filesystem_async._results_queue._manager.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel"), [("llama", {"tensor": 2}), ("qwen2_moe", {"tensor": 2, "expert": 2}), ("deepseek_v3", {})]
)
def test_checkpoints_of_megatron_can_be_read(tmp_path: Path, name: str, parallel: dict[str, object]) -> None:
    folder, target = families.save(name, tmp_path / "hf"), tmp_path / "megatron"
    ranks = 2 if parallel else 1

    run_ranks(save_by_megatron, ranks, str(folder), str(target), parallel, initialize=False, timeout_seconds=280)

    shutil.copy(folder / "config.json", target)
    assert compare(folder, target, 1, CONSOLE).is_same


SLOW_READER = """
import sys, time
from megatron_rl.models import hf_reader
read = hf_reader.HFCheckpointReader.read
hf_reader.HFCheckpointReader.read = lambda self, name: (time.sleep(0.01), read(self, name))[1]
from megatron_rl.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.processes
def test_a_killed_conversion_can_be_resumed(demo: Path, tmp_path: Path) -> None:
    target, part = tmp_path / "megatron", tmp_path / ".megatron.part"
    command = [sys.executable, "-c", SLOW_READER, "hf-to-megatron", str(demo), str(target), "--threads", "1"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not list(part.glob(".jobs/__1_*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in part.glob("*.distcp") if _is_recorded(path)}
    assert finished

    to_core(demo, target)

    assert not part.exists()
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished  # not written again
    assert compare(demo, target, 1, CONSOLE).is_same


def _is_recorded(path: Path) -> bool:
    return (path.parent / ".jobs" / f"{path.name}.json").is_file()


def test_a_changed_source_restarts_the_conversion(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(demo, source)
    stale = tmp_path / ".megatron.part"
    (stale / ".jobs").mkdir(parents=True)
    (stale / ".jobs" / "plan.json").write_text("{}")
    (stale / "__0_0.distcp").write_bytes(b"old")
    (stale / ".jobs" / "__0_0.distcp.json").write_text('{"bytes": 3, "record": {"rows": [], "tensors": {}}}')

    to_core(source, tmp_path / "megatron")

    assert compare(source, tmp_path / "megatron", 1, CONSOLE).is_same


def test_multi_token_prediction_layers_are_copied(tmp_path: Path) -> None:
    source = families.save("glm4_moe", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    extra = {"model.layers.4.eh_proj.weight": torch.randn(64, 128), "model.layers.4.enorm.weight": torch.randn(64)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors", {"format": "pt"})

    to_core(source, tmp_path / "megatron")
    to_hugging_face(tmp_path / "megatron", tmp_path / "again")

    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_flipped_bit_of_a_tensor_is_noticed_when_it_is_read(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    to_core(demo, folder)
    family = family_of(read_hf_config(folder))
    name = "model.embed_tokens.weight"
    bits = open_checkpoint(folder, family).read(name).numpy().tobytes()[:64]
    file = next(path for path in folder.glob("*.distcp") if bits in path.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(bits)] ^= 1
    file.write_bytes(content)

    with pytest.raises(DataError, match=rf"{name} in .* was modified or is damaged"):
        open_checkpoint(folder, family).read(name)


def test_an_existing_target_is_an_error(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; remove it"):
        to_core(demo, tmp_path)


def test_verify_names_the_differing_tensors(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(demo, tmp_path / "other")
    tensors = load_file(demo / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, tmp_path / "other" / "model.safetensors")

    assert main(["convert", "verify", str(demo), str(tmp_path / "other")]) == 1

    assert "model.norm.weight: largest difference 0.5" in capsys.readouterr().out
    assert main(["convert", "verify", str(demo), str(demo)]) == 0


@pytest.mark.processes
def test_outputs_are_compared_on_a_prompt(demo: Path, tmp_path: Path) -> None:
    to_core(demo, tmp_path / "megatron")
    folders = [str(demo), str(tmp_path / "megatron")]
    command = [sys.executable, "-m", "megatron_rl", "convert", "verify", *folders, "--logits", "3,1,4,1,5,9"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)

    assert done.returncode == 0, done.stderr
    assert "log-probs of the prompt's 5 tokens differ by at most" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"model.layers.0.more": torch.zeros(2)}), "extra: model.layers.0.more"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(65)}), r"wrong shape: model.norm.weight is \[65\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "not a floating-point tensor"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(48, 64).bfloat16()}),
            "they become one tensor",
        ),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_written(demo, tmp_path: Path, change, message) -> None:
    source = tmp_path / "hf"
    shutil.copytree(demo, source)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")

    with pytest.raises(DataError, match=message):
        to_core(source, tmp_path / "megatron")

    assert not (tmp_path / "megatron").exists()
