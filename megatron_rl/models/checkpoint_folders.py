"""Checkpoint folders: which kind one holds, and the small files that go from one to the next."""

import json
import shutil
from pathlib import Path

from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.hf_mapping import read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, HFConfig
from megatron_rl.models.hf_reader import INDEX, HFCheckpointReader
from megatron_rl.models.torch_dist import FORMAT, is_torch_dist
from megatron_rl.models.torch_dist_reader import TorchDistReader
from megatron_rl.models.training_checkpoint import INDEX as PIECES
from megatron_rl.models.training_checkpoint import META, SAMPLER, TrainingCheckpointReader

COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")
"""Config, tokenizer, generation config and chat template go along as they are."""
MANIFEST = "manifest.json"
CONFIG, QUANTIZATION_CONFIG = "config.json", "quantization_config"
_OF_THE_WEIGHTS = (INDEX, FORMAT, MANIFEST, PIECES, META, SAMPLER)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides its weights; these will not be quantised, whatever the source's are."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in _OF_THE_WEIGHTS:
                shutil.copyfile(path, target / path.name)
    if (target / CONFIG).is_file() and QUANTIZATION_CONFIG in (hf := read_hf_config(target)):
        write_hf_config(target, {key: value for key, value in hf.items() if key != QUANTIZATION_CONFIG})


def write_hf_config(folder: Path, hf: HFConfig) -> None:
    """Write ``config.json``."""
    (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def holds_hf_files(folder: Path) -> bool:
    """Return whether other programs can read a checkpoint folder: it is neither torch_dist nor our own pieces."""
    return not is_torch_dist(folder) and not _holds_pieces(folder)


def _holds_pieces(folder: Path) -> bool:
    return (folder / META).is_file() and (folder / PIECES).is_file()


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights of any form, be they whole or not."""
    return any((folder / name).exists() for name in (META, FORMAT)) or any(folder.glob("*.safetensors*"))


def open_checkpoint(folder: Path, family: Family) -> CheckpointReader:
    """Return the tensors of a checkpoint folder; its config.json is in it in either case.

    Raises:
        DataError: the folder holds no checkpoint, or a file of it cannot be read.
    """
    if _holds_pieces(folder):
        return TrainingCheckpointReader(folder, family)
    if is_torch_dist(folder):
        return TorchDistReader(folder, family)
    return HFCheckpointReader(folder, family, read_hf_config(folder))
