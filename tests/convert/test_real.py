"""End-to-end test with a real model: SmolLM2-135M-Instruct, and the equivalent mixture of four experts.

Slow, and only where the package gguf is installed: python -m pytest -m slow tests/convert/test_real.py. Needs 8 GB of
memory and, for its last part, .venv-sglang (tools/sglang-cpu).
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.fleet.sglang import sglang_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SGLANG = ROOT / ".venv-sglang" / "bin" / "python"
SETTINGS = """
[model]
path = "{model}"
dtype = "bfloat16"
[task]
name = "jsonl"
path = "{folder}/prompts.jsonl"
verifier = "exact"
max_prompt_tokens = 64
[rollout]
engine = "embedded"
sampling = {{ max_new_tokens = 8 }}
start_timeout_seconds = 600
[train]
steps = 2
prompts_per_step = 2
group_size = 2
updates_per_step = 1
tokens_per_microbatch = 256
step_timeout_seconds = 900
[optimizer]
lr = 1e-6
[log]
path = "{folder}/run"
"""
QUESTIONS = {"What is 2 + 2?": "4", "What is 3 + 5?": "8", "What is the capital of France?": "Paris"}
NEW_TOKENS = 16


def run(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed: pip install --no-deps gguf")
    folder = tmp_path_factory.mktemp("real")
    run("tools/fetch_smollm2.py", folder / "dense")
    print(run("tools/upcycle.py", folder / "dense", folder / "mixture", "--experts", 4))
    return folder


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True) for c in chats]
    return [list(one["input_ids"]) for one in encoded]


@torch.no_grad()
def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """Return the greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    answers = []
    for prompt in prompts_of(folder):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


@contextlib.contextmanager
def sglang(folder: Path, log: Path) -> Iterator[str]:
    settings = tomllib.loads((ROOT / "configs" / "engine" / "sglang-cpu.toml").read_text())["rollout"]
    options = {**settings["sglang"], "dtype": "float32", "mem_fraction_static": 0.3, "max_total_tokens": 4096}
    server = sglang_server(str(SGLANG), str(folder), log, options, settings["environment"])
    server.start()
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.exit_status is None, server.log_tail()
            assert time.monotonic() < deadline, server.log_tail()
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{server.url}/health", timeout=10)
                break
            time.sleep(1)
        yield server.url
    finally:
        server.stop()


def by_sglang(folder: Path, log: Path) -> list[list[int]]:
    body = {"input_ids": prompts_of(folder), "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    with sglang(folder, log) as url:
        request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=600) as reply:
            return [answer["output_ids"] for answer in json.load(reply)]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_real_model_is_converted_trained_and_served(smollm: Path, tmp_path: Path, kind: str) -> None:
    source, megatron, again = smollm / kind, tmp_path / "megatron", tmp_path / "again"
    print(run("-m", "megatron_rl", "convert", "hf-to-megatron", source, megatron))
    print(run("-m", "megatron_rl", "convert", "megatron-to-hf", megatron, again))
    print(run("-m", "megatron_rl", "convert", "verify", source, again))
    text = AutoTokenizer.from_pretrained(again).batch_decode(by_transformers(again))
    assert "Paris" in text[2]
    assert text == AutoTokenizer.from_pretrained(source).batch_decode(by_transformers(source))

    lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in QUESTIONS.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run.toml").write_text(SETTINGS.format(model=megatron, folder=tmp_path))
    print(run("-m", "megatron_rl", "train", tmp_path / "run.toml"))
    trained = tmp_path / "run" / "export"
    answers = by_transformers(trained)
    print(kind, AutoTokenizer.from_pretrained(trained).batch_decode(answers))
    assert len(answers) == len(QUESTIONS)

    if not SGLANG.is_file():
        pytest.skip("no .venv-sglang: run tools/sglang-cpu to compare with SGLang too")
    assert by_sglang(trained, tmp_path / "sglang.log") == answers
