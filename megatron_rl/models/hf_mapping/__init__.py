"""Model families that this package can train, by the ``model_type`` of Hugging Face."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.hf_mapping import deepseek, dense, glm4_moe, gpt_oss, mixtral, qwen2_moe, qwen3_moe
from megatron_rl.models.hf_mapping.rules import Family, HFConfig

FAMILIES: Mapping[str, Callable[[HFConfig], Family]] = {
    "llama": dense.llama,
    "qwen2": dense.qwen2,
    "qwen3": dense.qwen3,
    "mixtral": mixtral.family,
    "qwen2_moe": qwen2_moe.family,
    "qwen3_moe": qwen3_moe.family,
    "glm4_moe": glm4_moe.family,
    "deepseek_v2": deepseek.v2,
    "deepseek_v3": deepseek.v3,
    "kimi_k2": deepseek.v3,
    "gpt_oss": gpt_oss.family,
}
"""``model_type`` of config.json -> function that builds the family from config.json."""


def read_hf_config(folder: Path) -> HFConfig:
    """Return ``config.json`` of a Hugging Face checkpoint folder.

    Raises:
        ConfigError: the folder or the file does not exist.
        DataError: the file is not valid JSON or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"no config.json in {str(folder)!r} (model.path); give the folder of a Hugging Face checkpoint"
        )
    try:
        hf = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(hf, dict):
        raise DataError(f"{path} must hold a JSON object; found {type(hf).__name__}")
    return hf


def family_of(hf: HFConfig) -> Family:
    """Return the family of a parsed config.json.

    Raises:
        ConfigError: the model type is not supported, or a key is missing or has a wrong type.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} of config.json is not supported; supported: {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[model_type](hf)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"config.json of a {model_type} model has no key {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json of a {model_type} model has a value of the wrong type: {error}") from error
