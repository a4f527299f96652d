"""The tools that are Python, and the checkpoint that one of them made."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from megatron_rl.observability.recorder import RunRecorder
from megatron_rl.tasks.chained_arithmetic import SYMBOLS

ROOT = Path(__file__).parent.parent.parent
DEMO_MODEL = ROOT / "configs" / "demo-model"


@pytest.fixture
def compare_runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", ROOT / "tools" / "compare_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers() -> dict[str, Any]:
    return json.loads((DEMO_MODEL / "README.md").read_text().split("```")[1].removeprefix("json"))


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    with RunRecorder(folder, len(losses)) as recorder:
        for step, loss in enumerate(losses):
            recorder.write(step, {"loss": loss})
    return folder


@pytest.mark.parametrize(
    ("losses", "code", "words"),
    [
        ([0.1, 0.2], 0, "same: 2 lines"),
        ([0.1, 0.2 + 1e-16], 1, "different: step 1, loss"),
        ([0.1], 1, "different: 2 and 1 lines"),
    ],
)
def test_runs_are_compared_bit_for_bit_times_aside(tmp_path, capsys, monkeypatch, compare_runs, losses, code, words):
    runs = [write_run(tmp_path / "a", [0.1, 0.2]), write_run(tmp_path / "b", losses)]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, runs)])
    assert compare_runs.main() == code
    assert words in capsys.readouterr().out


def test_the_demo_model_has_one_tensor_an_expert_and_about_a_third_of_a_million_parameters():
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
        parameters = sum(file.get_tensor(name).numel() for name in names)
    assert parameters == numbers()["parameters"] == 336160
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert {f"model.layers.2.mlp.experts.{e}.{part}.weight" for e in range(8)} <= names


def test_the_demo_model_leaves_work_for_rl():
    sampled = numbers()["sampled"]
    assert 0.33 < sampled["accuracy"] < 0.43
    assert sampled["ended"] > 0.99


def test_its_tokenizer_has_one_token_a_symbol():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert tokenizer.encode(SYMBOLS) == list(range(16))
    assert tokenizer.decode(tokenizer.encode("7+5*3-2=7+5=2;#2")) == "7+5*3-2=7+5=2;#2"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (16, 17, 18)
    assert AutoConfig.from_pretrained(DEMO_MODEL).eos_token_id == 16


def setup_with(python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "setup"], env={**os.environ, "PYTHON": python}, capture_output=True, text=True, check=False
    )


@pytest.mark.processes
def test_setup_without_python_says_what_to_install():
    done = setup_with("python-of-nowhere")
    assert done.returncode == 1
    assert "no python-of-nowhere on this machine (PYTHON); name an interpreter of Python 3.11" in done.stderr


@pytest.mark.processes
def test_setup_with_an_old_python_says_which_is_needed(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    done = setup_with(str(old))
    assert done.returncode == 1
    assert "is Python 3.9 (PYTHON); 3.11, 3.12 or 3.13 is needed" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("tool", ["setup", "check", "check-oldest", "check-te", "te-cpu", "demo"])
def test_shell_tools_parse_and_are_executable(tool):
    path = ROOT / "tools" / tool
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_scripts_that_measure_a_gpu_run_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "MEGATRON_RL_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = ["benchmarks/gpu.sh", str(tmp_path), "all", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path.name for path in tmp_path.glob("*.json")}
    smoke = {f"smoke-{part}" for part in ("import", "spec", "step", "parity")}
    assert written == {
        f"{part}.json" for part in ("limit", "segments", "push", "ipc", "step-1.5B-8k", "result", *smoke)
    }
    result = json.loads((tmp_path / "result.json").read_text())
    assert smoke < {step["step"] for step in result["steps"]}
    assert {step["exit"] for step in result["steps"]} == {0}
    tables = (tmp_path / "tables.md").read_text()
    assert "| 1.5B-8k |" in tables
    assert "step-1.5B-8k, slowest operations" in tables
