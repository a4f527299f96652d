"""Upcycling of a tiny dense model: an exactly equivalent mixture with an untied output head."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.policy import families

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def upcycle(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "upcycle.py"), str(source), str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_mixture_equals_the_dense_model_and_has_an_untied_head(tmp_path, name):
    source = families.save(name, tmp_path / "dense")
    tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]

    done = upcycle(source, tmp_path / "mixture", "--experts", "4")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "logits differ by at most" in done.stdout
    tensors = dict[str, torch.Tensor]()
    for file in (tmp_path / "mixture").glob("*.safetensors"):
        tensors |= load_file(file)
    assert json.loads((tmp_path / "mixture" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]) is tied
