"""The tokenizer of a model folder, and the tokens that end a response.

Trainer and inference servers use the same set of stop tokens: the end-of-sequence tokens of config.json, of
generation_config.json and of the tokenizer together, as SGLang does.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rl.config.schema import Run
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.hf_mapping import read_hf_config

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(folder: Path, *, trust_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Args:
        folder: the folder; nothing is downloaded.
        trust_code: whether Python files of the folder that the tokenizer names may run (``model.trust_code``).

    Raises:
        ConfigError: there is no tokenizer, it cannot be built, or it needs code that is not trusted.
    """
    if not has_tokenizer(folder):
        raise ConfigError(f"no tokenizer in {folder} (model.path); copy {' and '.join(TOKENIZER_FILES)} of the model")
    if (code := _code_of(folder)) and not trust_code:
        raise ConfigError(
            f"the tokenizer of {folder} (model.path) runs code of that folder ({code}); read it, then write"
            " model.trust_code = true"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_code, local_files_only=True)
    except Exception as error:  # the code of tokenizers raises plain Exception, and that of a folder anything
        raise ConfigError(
            f"the tokenizer of {folder} (model.path) cannot be built: {type(error).__name__}: {error}"
        ) from error


def _code_of(folder: Path) -> str:
    """Return the code that ``auto_map`` of tokenizer_config.json names; empty if transformers' own code is enough."""
    auto_map = _json_object(folder / TOKENIZER_CONFIG).get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
    names = entry if isinstance(entry, list) else [entry]
    return ", ".join(str(name) for name in names if name)


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the ids of all tokens that end a response of this model, in ascending order.

    Args:
        folder: a folder with config.json, and generation_config.json if there is one.
        tokenizer: the tokenizer of the folder, if it has one.
    """
    hf = read_hf_config(folder)
    text = hf.get("text_config")
    entries = [
        hf.get("eos_token_id"),
        text.get("eos_token_id") if isinstance(text, Mapping) else None,
        _json_object(folder / GENERATION_CONFIG).get("eos_token_id"),
        None if tokenizer is None else tokenizer.eos_token_id,
    ]
    ids = [token for entry in entries for token in (entry if isinstance(entry, list) else [entry])]
    return tuple(sorted({token for token in ids if token is not None}))


def with_stop_tokens(run: Run, tokenizer: PreTrainedTokenizerBase) -> Run:
    """Return the configuration with all stop tokens of the model in ``rollout.sampling.stop_token_ids``.

    Every engine is then told the same set, whichever of the model's files it reads by itself.
    """
    sampling = run.rollout.sampling
    ids = sorted({*sampling.stop_token_ids, *stop_tokens(Path(run.model.path), tokenizer)})
    sampling = sampling.model_copy(update={"stop_token_ids": tuple(ids)})
    return run.model_copy(update={"rollout": run.rollout.model_copy(update={"sampling": sampling})})


def _json_object(path: Path) -> Mapping[str, object]:
    """Return a JSON object from a file, empty if there is no such file.

    Raises:
        DataError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object; found {type(value).__name__}")
    return value
