"""The sizes of a model that a layout has to divide, from a Hugging Face ``config.json``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import ConfigError, DataError

_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "ffn": ("intermediate_size",),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size"),
    "experts_per_token": ("num_experts_per_tok",),
}
_ONLY_WITH_EXPERTS = ("experts", "expert_ffn", "experts_per_token")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; without experts the last three are 0.

    Attributes:
        has_dense_layers: some layers have an ordinary feed-forward network.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    positions: int
    has_dense_layers: bool
    experts: int = 0
    expert_ffn: int = 0
    experts_per_token: int = 0


def read_shape(folder: Path) -> Shape:
    """Return the shape of a checkpoint; a ConfigError or DataError says what its ``config.json`` lacks."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"no config.json in {folder} (model.path); write the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON: {path}: {error}; copy it again from where the checkpoint came") from error
    if not isinstance(config, dict):
        raise DataError(f"not a JSON object: {path}; copy it again from where the checkpoint came")
    return shape_of(config, path)


def shape_of(config: Mapping[str, object], path: Path) -> Shape:
    """Return the shape that a parsed ``config.json`` describes."""
    sizes: dict[str, int] = {}
    missing: list[str] = []
    for field, names in _NAMES.items():
        found = next((config[name] for name in names if config.get(name) is not None), None)
        if isinstance(found, int):
            sizes[field] = found
        elif field not in _ONLY_WITH_EXPERTS or (sizes.get("experts") and field != "experts"):
            missing.append(" or ".join(names))
    if missing:
        raise DataError(f"{path} has no {', no '.join(missing)}; it must describe a decoder-only language model")
    if "experts" not in sizes:
        sizes = {field: size for field, size in sizes.items() if field not in _ONLY_WITH_EXPERTS}
    dense = config.get("mlp_only_layers")
    step = config.get("decoder_sparse_step", 1)
    first_dense = config.get("first_k_dense_replace", 0)
    has_dense_layers = "experts" not in sizes or bool(dense) or step != 1 or first_dense != 0
    return Shape(**sizes, has_dense_layers=has_dense_layers)
