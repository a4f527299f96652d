"""Building tokenizers, and the tokens that end a response."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.models.tokenizers import open_tokenizer, stop_tokens, with_stop_tokens
from tests.inference_server import tiny


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose three files name three different end-of-sequence tokens."""
    folder = tiny.save("llama", tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "w7"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"eos_token_id": 3})
    write(folder, "generation_config.json", {"eos_token_id": [5, 3]})
    return folder


def test_the_stop_tokens_of_all_three_files_end_a_response(model):
    assert stop_tokens(model, open_tokenizer(model)) == (3, 5, 7)
    assert ServedModel(str(model), "float32", "0").eos_ids == (3, 5, 7)


@pytest.mark.parametrize(("value", "expected"), [(None, (5, 7)), ([9, 3], (3, 5, 7, 9))])
def test_a_file_may_name_no_stop_token_or_several(model, value, expected):
    config = json.loads((model / "config.json").read_text())
    write(model, "config.json", config | {"eos_token_id": value})
    write(model, "generation_config.json", {"eos_token_id": 5})

    assert stop_tokens(model, open_tokenizer(model)) == expected


def test_a_run_sends_the_whole_set_to_every_engine(model):
    path = f'model.path="{model}"'
    run = load(Run, ["configs/demo.toml"], [path, "rollout.sampling.stop_token_ids=[11]"]).run

    assert with_stop_tokens(run, open_tokenizer(model)).rollout.sampling.stop_token_ids == (3, 5, 7, 11)


def test_code_of_the_folder_runs_only_if_it_is_trusted(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    write(model, "tokenizer_config.json", settings | code)
    (model / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    mark = 42\n"
    )

    with pytest.raises(ConfigError, match=r"tokenization_mine.Mine.*model.trust_code = true"):
        open_tokenizer(model)
    assert open_tokenizer(model, trust_code=True).mark == 42


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer.json", "not JSON"), ("tokenizer_config.json", "[]")]
)
def test_a_tokenizer_that_cannot_be_built_is_one_error_with_its_folder(model, name, content):
    (model / name).write_text(content)

    with pytest.raises((ConfigError, DataError), match=str(model)):
        open_tokenizer(model)


def test_a_folder_without_a_tokenizer_is_one_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer in .*tokenizer.json"):
        open_tokenizer(tmp_path)
