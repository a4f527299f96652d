"""Comparison of two checkpoints of any format, tensor by tensor."""

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
    """Result of a comparison.

    Attributes:
        num_equal: number of tensors with the same dtype, shape and bytes.
        differing: tensor name -> description of the difference.
        missing: tensor name -> the only folder that has it.
    """

    num_equal: int = 0
    differing: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Whether the checkpoints are equal."""
        return not self.differing and not self.missing


def compare(first: Path, second: Path, threads: int, console: Console) -> CheckpointComparison:
    """Compare all tensors by Hugging Face name, FP8 after dequantization, with a few tensors in memory at a time.

    Raises:
        DataError: a folder cannot be read, or its tensors do not match its config.json.
    """
    readers = [_open(folder) for folder in (first, second)]
    sizes = [_tensor_bytes(reader) for reader in readers]
    comparison = CheckpointComparison()
    for these, others, folder in ((*sizes, first), (sizes[1], sizes[0], second)):
        comparison.missing |= {name: str(folder) for name in these if name not in others}
    names = [name for name in sizes[0] if name in sizes[1]]
    total = sum(sizes[0][name] for name in names)
    with progress_bar(console, total) as report, ThreadPoolExecutor(threads) as pool:
        # Consecutive names can be parts of one stored tensor, so each thread gets a contiguous range.
        count = math.ceil(len(names) / threads) or 1
        ranges = [names[start : start + count] for start in range(0, len(names), count)]

        def compare_range(some_names: list[str]) -> dict[str, str]:
            one, two = (reader.for_thread() for reader in readers)
            differing = {}
            for name in some_names:
                if difference := _describe_difference(one, two, name):
                    differing[name] = difference
                report(sizes[0][name])
            return differing

        for differing in pool.map(compare_range, ranges):
            comparison.differing |= differing
    comparison.num_equal = len(names) - len(comparison.differing)
    return comparison


def _open(folder: Path) -> CheckpointReader:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    family = family_of(read_hf_config(folder))
    source = open_checkpoint(folder, family)
    source.check(family)
    return source


def _tensor_bytes(source: CheckpointReader) -> Mapping[str, int]:
    """Return the size in bytes of each tensor to compare; FP8 scales are compared with their matrix."""
    return {
        name: spec.num_bytes
        for name, spec in source.specs.items()
        if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in source.specs)
    }


def _describe_difference(first: CheckpointReader, second: CheckpointReader, name: str) -> str:
    """Return how a tensor differs; empty if it is equal."""
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
