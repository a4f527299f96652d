"""What is in the files of a Hugging Face checkpoint, without reading the weights."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from megatron_rl.errors import DataError
from megatron_rl.policy.names.rules import Family


def hf_files(folder: Path) -> dict[str, Path]:
    """Return which safetensors file of the folder holds each tensor.

    Raises:
        DataError: no files, an unreadable file, or a tensor in two files.
    """
    where: dict[str, Path] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise DataError(f"no *.safetensors in {str(folder)!r} (model.path)")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as reader:
                names = list(reader.keys())
        except Exception as error:  # safetensors raises its own type, which is not exported, for a broken header
            raise DataError(f"{path} is not a readable safetensors file: {error}") from error
        for name in names:
            if name in where:
                raise DataError(f"tensor {name} is in {where[name].name} and again in {path.name} of {str(folder)!r}")
            where[name] = path
    return where


def check_hf_tensors(files: Mapping[str, Path], family: Family, folder: Path) -> None:
    """Compare names and shapes in the files with what the family must have; report every difference at once."""
    expected = family.hf_tensors()
    ignored = {"lm_head.weight"} if family.tied else set()
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in files]
    problems += [
        f"extra: {name} (in {files[name].name})" for name in files if name not in expected and name not in ignored
    ]
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no mapping)
                found = tuple(reader.get_slice(name).get_shape())
                if name in expected and found != expected[name]:
                    problems.append(f"misshapen: {name} is {list(found)}, expected {list(expected[name])}")
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise DataError(f"the checkpoint in {str(folder)!r} (model.path) does not fit its config.json:\n  {shown}")
