"""The interface of checkpoint readers: Hugging Face tensors by name, independent of the file format.

Loading, conversion and comparison use a ``CheckpointReader``. There is one for Hugging Face folders (safetensors;
experts separate or fused; bfloat16, FP8 or MXFP4), one for megatron-core's distributed checkpoints (``torch_dist``),
and one for this package's training checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.fp8 import SCALE_SUFFIX
from megatron_rl.models.hf_mapping.rules import Family

SHOWN = 20
"""Of many problems, how many an error lists."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, as ``CheckpointReader.read`` returns it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class CheckpointReader(ABC):
    """The tensors of a checkpoint under the names of the family's table; one is read at a time."""

    folder: Path
    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in memory of its own."""

    def for_thread(self) -> Self:
        """Return a reader of the same checkpoint for another thread."""
        return copy(self)

    def is_passthrough(self, name: str, family: Family) -> bool:
        """Return whether a tensor is none of the model's own: it is carried from checkpoint to checkpoint."""
        is_scale = name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self.specs
        return is_scale or family.is_passthrough(name)

    def describe_location(self, name: str) -> str:
        """Return which file holds a tensor, to follow its name in an error; nothing where that helps nobody."""
        return ""

    def check(self, family: Family) -> None:
        """Compare names and shapes with what the family must have.

        Raises:
            DataError: lists every tensor that is missing, extra or misshapen.
        """
        expected = family.hf_shapes()
        problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in self.specs]
        problems += [
            f"extra: {n}{self.describe_location(n)}"
            for n in self.specs
            if n not in expected and not self.is_passthrough(n, family)
        ]
        problems += [
            f"misshapen: {name} is {list(spec.shape)}, expected {list(expected[name])}"
            for name, spec in self.specs.items()
            if name in expected and spec.shape != expected[name]
        ]
        problems += [
            f"not a floating-point tensor: {name} is {spec.dtype}"
            for name, spec in self.specs.items()
            if name in expected and not spec.dtype.is_floating_point
        ]
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            shown = "\n  ".join(problems[:SHOWN] + more)
            raise DataError(f"the checkpoint in {str(self.folder)!r} does not fit its config.json:\n  {shown}")
