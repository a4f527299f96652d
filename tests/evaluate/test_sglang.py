"""Greedy multi-turn evaluation on SGLang gives the responses of the embedded server; see tools/check-sglang."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.convert import to_megatron
from megatron_rl.fleet.sglang import sglang_server
from tests.e2e.job import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

MODEL = ROOT / "configs" / "demo-model"
CONFIGS = [str(ROOT / "configs" / name) for name in ("demo.toml", "environment/calculator.toml")]
ENGINE = str(ROOT / "configs" / "engine" / "sglang-cpu.toml")
GREEDY = ["evaluate.temperature=0", "evaluate.prompts=48"]
SAME = 46
"""Responses of 48 that must be equal; rounding can change the choice between equally likely tokens."""


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not Path(str(load(Run, [*CONFIGS, ENGINE]).run.rollout.sglang_python)).exists():
        pytest.skip("no .venv-sglang: tools/sglang-cpu makes it")


def evaluated(output: Path, *words: str) -> list[str]:
    """Evaluate greedily and return the responses."""
    assert main(["eval", *words, *CONFIGS, *GREEDY, f"--output={output}"]) == 0
    metrics = json.loads((output / "result.json").read_text())["figures"][0]
    assert (metrics["prompts"], metrics["samples"], metrics["unverified"]) == (48, 48, 0)
    assert "pass@2" not in metrics
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert metrics["pass@1"]["mean"] == pytest.approx(sum(line["correct"] for line in lines) / 48)
    responses = [line["response"] for line in lines]
    steps = [step for response in responses for step in re.findall(r"(\d)([+*-])(\d)=(\d);", response)]
    assert len(steps) > 48
    assert all(str(eval(f"({a}{sign}{b}) % 10")) == result for a, sign, b, result in steps)  # the calculator's turns
    return responses


def same(some: list[str], others: list[str]) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))


def test_a_hugging_face_checkpoint_on_a_new_server(tmp_path):
    assert same(evaluated(tmp_path / "sglang", ENGINE), evaluated(tmp_path / "ours")) >= SAME


def test_a_megatron_checkpoint_with_other_weights_on_a_running_server(tmp_path):
    shutil.copytree(MODEL, tmp_path / "hf")
    weights = load_file(MODEL / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    weights = {
        n: w + 0.05 * w.std() * torch.randn(w.shape, generator=noise) if w.dim() > 1 else w for n, w in weights.items()
    }
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    to_megatron.convert(tmp_path / "hf", tmp_path / "torch_dist", 1, Console(quiet=True))
    rollout = load(Run, [*CONFIGS, ENGINE]).run.rollout
    options = {**rollout.sglang, "dtype": "float32"}
    server = sglang_server(str(rollout.sglang_python), str(MODEL), tmp_path / "log", options, rollout.environment)
    server.start()
    try:
        asked = [str(tmp_path / "torch_dist"), ENGINE, f'rollout.urls=["{server.url}"]']
        found = evaluated(tmp_path / "sglang", *asked)
    finally:
        server.stop()
    assert same(found, evaluated(tmp_path / "ours", str(tmp_path / "hf"))) >= SAME
    assert same(found, evaluated(tmp_path / "before")) < SAME
