"""Two checkpoints of any kind compared, tensor by tensor."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from megatron_rl.convert.jobs import progress_bar
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import open_checkpoint
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.fp8 import SCALE_SUFFIX
from megatron_rl.models.hf_mapping import family_of, read_hf_config


@dataclass
class CheckpointComparison:
    """What two checkpoints have in common.

    Attributes:
        equal: how many tensors have the same dtype, shape and bytes.
        differing: name -> what differs, in words.
        only: name -> the folder that alone has it.
    """

    equal: int = 0
    differing: dict[str, str] = field(default_factory=dict)
    only: dict[str, str] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """True if nothing differs."""
        return not self.differing and not self.only


def compare(first: Path, second: Path, threads: int, console: Console) -> CheckpointComparison:
    """Compare all tensors under their Hugging Face names, FP8 by its values; a few are in memory at a time.

    Raises:
        DataError: a folder that cannot be read, or that does not fit its own config.json.
    """
    sources = [_opened(folder) for folder in (first, second)]
    specs = [_compared(source) for source in sources]
    found = CheckpointComparison()
    for own, other, folder in ((*specs, first), (specs[1], specs[0], second)):
        found.only |= {name: str(folder) for name in own if name not in other}
    names = [name for name in specs[0] if name in specs[1]]
    total = sum(specs[0][name] for name in names)
    with progress_bar(console, total) as report, ThreadPoolExecutor(threads) as pool:
        size = math.ceil(len(names) / threads) or 1  # neighbours are parts of one tensor: a thread has a run of them
        lists = [names[start : start + size] for start in range(0, len(names), size)]

        def compare_some(some: list[str]) -> dict[str, str]:
            one, two = (source.for_thread() for source in sources)
            words = {}
            for name in some:
                if word := _difference(one, two, name):
                    words[name] = word
                report(specs[0][name])
            return words

        for words in pool.map(compare_some, lists):
            found.differing |= words
    found.equal = len(names) - len(found.differing)
    return found


def _opened(folder: Path) -> CheckpointReader:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    family = family_of(read_hf_config(folder))
    source = open_checkpoint(folder, family)
    source.check(family)
    return source


def _compared(source: CheckpointReader) -> Mapping[str, int]:
    """Return the tensors to compare and their bytes; scales count with the matrix that they belong to."""
    return {
        name: spec.num_bytes
        for name, spec in source.specs.items()
        if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in source.specs)
    }


def _difference(first: CheckpointReader, second: CheckpointReader, name: str) -> str:
    """Return in words how a tensor differs; empty if it does not."""
    one, two = first.read(name), second.read(name)
    if one.shape != two.shape:
        return f"{list(one.shape)} and {list(two.shape)}"
    if one.dtype == two.dtype and torch.equal(_bytes(one), _bytes(two)):
        return ""
    dtypes = "" if one.dtype == two.dtype else f"{one.dtype} and {two.dtype}, "
    largest = float((one.double() - two.double()).abs().nan_to_num(nan=math.inf).max()) if one.numel() else 0.0
    return f"{dtypes}largest difference {largest:.3g}, largest value {float(one.double().abs().max()):.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
