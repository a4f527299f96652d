"""What cannot work is refused in one message before any process is started."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_rl.cli import main
from tests.e2e.job import ROOT, train


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Run the command line; return its message, which must be the only one, and no process may be started."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    def run(*words: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "__init__", started)
            patch.setattr("megatron_rl.launch.local.found_versions", dict)
            assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"megatron-rl {words[0]}: ")
        return said

    return run


def copied_model(folder: Path) -> Path:
    return shutil.copytree(ROOT / "configs" / "demo-model", folder)


def test_a_model_that_is_not_there(tmp_path, refusal):
    said = refusal(*train(tmp_path / "run", f"model.path={tmp_path / 'nowhere'}"))
    assert "no config.json in" in said
    assert "nowhere" in said
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_tensor(tmp_path, refusal):
    model = copied_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, model / "model.safetensors")
    said = refusal(*train(tmp_path / "run", f"model.path={model}"))
    assert "missing: model.layers.1.mlp.experts.3.up_proj.weight [" in said
    assert "extra: extra.weight (in model.safetensors)" in said


def test_a_checkpoint_that_was_cut_off(tmp_path, refusal):
    model = copied_model(tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    said = refusal(*train(tmp_path / "run", f"model.path={model}"))
    assert f"{file} is not a readable safetensors file" in said


def test_a_prompt_that_cannot_be_tokenized(tmp_path, refusal):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "1+2=", "answer": "3"}\n{"prompt": "cut \\ud83d", "answer": "5"}\n')
    words = ["task.name=jsonl", f"task.path={file}", "task.max_prompt_tokens=12", "task.heldout_fraction=0"]
    said = refusal(*train(tmp_path / "run", *words))
    assert f"{file}:2" in said
    assert "half of a surrogate pair" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run(straight, refusal):
    said = refusal(*train(straight))
    assert "holds a run already" in said
    assert "train.resume=true" in said


def test_a_run_that_failed_before_its_first_step_can_be_started_again_in_its_place(tmp_path, refusal):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train": {"steps": 7}}))
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(AssertionError, match="a process was started"):
        refusal(*train(tmp_path / "run"))


def test_resuming_with_another_model(tmp_path, straight, refusal):
    model = copied_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers - 1}))
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f"layers.{layers - 1}." not in name}
    save_file(kept, model / "model.safetensors")
    said = refusal(*train(straight, "train.resume=true", f"model.path={model}"))
    assert "belongs to another model than model.path" in said
    assert f"extra: decoder.layers.{layers - 1}.input_layernorm.weight" in said


def test_resuming_from_a_checkpoint_with_a_part_cut_off(tmp_path, straight, refusal):
    folder = shutil.copytree(straight, tmp_path / "run")
    newest = folder / "checkpoints" / "step_00000004"
    older = shutil.copytree(newest, newest.with_name("step_00000003"))
    for name in ("rank_00001.safetensors", "index.json", "meta.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        said = refusal(*train(folder, "train.resume=true"))
        assert str(newest / name) in said
        assert said.endswith(f"delete {newest} to continue from {older}\n")
        (newest / name).write_bytes(whole)


def test_serving_on_a_port_in_use(refusal):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal("serve", str(ROOT / "configs" / "demo-model"), "--port", str(port))
    assert f"127.0.0.1:{port}" in said
    assert "Address already in use" in said
