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

MAX_LISTED = 20
"""Maximum number of problems listed in one error message."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of the tensor that ``CheckpointReader.read`` returns."""

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
    """Reads the tensors of a checkpoint one at a time, by Hugging Face name.

    Attributes:
        folder: the checkpoint.
        specs: shape and dtype of every tensor, by name.
    """

    folder: Path
    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU that shares no memory with other tensors."""

    def for_thread(self) -> Self:
        """Return a reader of the same checkpoint for use in another thread."""
        return copy(self)

    def is_passthrough(self, name: str, family: Family) -> bool:
        """Return whether a tensor is copied when converting but is not a parameter of the model."""
        is_scale = name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self.specs
        return is_scale or family.is_passthrough(name)

    def describe_location(self, name: str) -> str:
        """Return the file that contains a tensor, formatted for an error message; empty if there is no single file."""
        return ""

    def check(self, family: Family) -> None:
        """Check names, shapes and dtypes against the family's table.

        Raises:
            DataError: lists the tensors that are missing, extra, of the wrong shape or not floating-point.
        """
        expected = family.hf_shapes()
        problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in self.specs]
        problems += [
            f"extra: {n}{self.describe_location(n)}"
            for n in self.specs
            if n not in expected and not self.is_passthrough(n, family)
        ]
        problems += [
            f"wrong shape: {name} is {list(spec.shape)}, expected {list(expected[name])}"
            for name, spec in self.specs.items()
            if name in expected and spec.shape != expected[name]
        ]
        problems += [
            f"not a floating-point tensor: {name} is {spec.dtype}"
            for name, spec in self.specs.items()
            if name in expected and not spec.dtype.is_floating_point
        ]
        if problems:
            more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
            shown = "\n  ".join(problems[:MAX_LISTED] + more)
            raise DataError(f"the checkpoint in {str(self.folder)!r} does not fit its config.json:\n  {shown}")
