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
            patch.setattr("megatron_rl.train.folder.found_versions", dict)
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


def test_resuming_with_another_layout(straight, refusal):
    said = refusal(*train(straight, "train.resume=true", "parallel.expert=1"))
    assert "was written with another layout: expert 2 there and 1 here" in said


def test_serving_on_a_port_in_use(refusal):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal("serve", str(ROOT / "configs" / "demo-model"), "--port", str(port))
    assert f"127.0.0.1:{port}" in said
    assert "Address already in use" in said
