"""The embedded server generates for every family that the policy trains, from either kind of checkpoint."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.convert import to_megatron
from tests.inference_server.tiny import finished, request_of, running
from tests.policy import families

PROMPTS = [[3, 1, 4], [15, 9, 2, 6, 5, 3, 5, 8, 9], [7]]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.mark.parametrize("name", families.MODELS)
def test_every_family_is_served_from_either_kind_of_checkpoint(tmp_path: Path, name: str) -> None:
    folder = families.save(name, tmp_path / "hf")
    to_megatron.convert(folder, tmp_path / "megatron", 1, Console(quiet=True))

    answers = []
    for served in (folder, tmp_path / "megatron"):
        with running(served) as engine:
            [sequences] = finished(engine, request_of(PROMPTS, [GREEDY] * len(PROMPTS)))
            assert engine.model.tensors.keys() == load_file(folder / "model.safetensors").keys()
        answers.append([sequence.output_ids for sequence in sequences])

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, first, second in zip(PROMPTS, *answers, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert first == second == whole[0, len(prompt) :].tolist()
