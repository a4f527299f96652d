"""Checkpoint folders: detect the format, open a reader, and copy the files that are not weights."""

import json
import shutil
from pathlib import Path

from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.encodings import QUANTIZATION_CONFIG
from megatron_rl.models.hf_mapping import read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, HFConfig
from megatron_rl.models.hf_reader import INDEX, HFCheckpointReader
from megatron_rl.models.torch_dist import FORMAT, MANIFEST, is_torch_dist
from megatron_rl.models.torch_dist_reader import TorchDistReader
from megatron_rl.models.training_checkpoint import INDEX as SHARDED_INDEX
from megatron_rl.models.training_checkpoint import LOSS, META, SAMPLER, TrainingCheckpointReader

WEIGHT_SUFFIXES = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".distcp",
        ".gguf",
        ".h5",
        ".msgpack",
        ".npz",
        ".onnx",
        ".tflite",
    ),
    *(".metadata", ".index.json", ".part"),
)
"""Ends of the names of files that hold weights or describe them."""
COMPANION_FOLDERS = ("additional_chat_templates",)
"""Folders copied with a checkpoint."""
CONFIG = "config.json"
_WEIGHT_FILES = (INDEX, FORMAT, MANIFEST, SHARDED_INDEX, META, SAMPLER, LOSS)


def copy_companions(source: Path, target: Path) -> None:
    """Copy every file that holds no weights: config, tokenizer with its code, templates, license.

    Hidden files stay, and ``quantization_config`` is removed from the copy of config.json.
    """
    for path in companion_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if (target / CONFIG).is_file() and QUANTIZATION_CONFIG in (hf := read_hf_config(target)):
        write_hf_config(target, {key: value for key, value in hf.items() if key != QUANTIZATION_CONFIG})


def companion_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that hold no weights, in alphabetical order."""
    found = (path for folder in (folder, *(folder / name for name in COMPANION_FOLDERS)) for path in folder.glob("*"))
    return sorted(
        path
        for path in found
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(WEIGHT_SUFFIXES)
        and path.name not in _WEIGHT_FILES
    )


def write_hf_config(folder: Path, hf: HFConfig) -> None:
    """Write ``config.json``."""
    (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def holds_hf_files(folder: Path) -> bool:
    """Return whether a checkpoint folder is in Hugging Face format, not torch_dist or a training checkpoint."""
    return not is_torch_dist(folder) and not _is_training_checkpoint(folder)


def _is_training_checkpoint(folder: Path) -> bool:
    return (folder / META).is_file() and (folder / SHARDED_INDEX).is_file()


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains weights in any format, complete or not."""
    return any((folder / name).exists() for name in (META, FORMAT)) or any(folder.glob("*.safetensors*"))


def open_checkpoint(folder: Path, family: Family) -> CheckpointReader:
    """Return a reader for a checkpoint folder of any format. The folder must contain config.json.

    Raises:
        DataError: the folder contains no checkpoint, or a file cannot be read.
    """
    if _is_training_checkpoint(folder):
        return TrainingCheckpointReader(folder, family)
    if is_torch_dist(folder):
        return TorchDistReader(folder, family)
    return HFCheckpointReader(folder, family, read_hf_config(folder))
