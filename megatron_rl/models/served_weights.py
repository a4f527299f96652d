"""The form of the weights that a run pushes, and whether a server can take them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.schema import Run
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import holds_hf_files
from megatron_rl.models.encodings import (
    QUANTIZATION_CONFIG,
    WeightEncoding,
    encoding_of,
    encoding_problems,
    format_of,
)
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, HFConfig
from megatron_rl.models.hf_reader import read_headers
from megatron_rl.models.quantization_settings import require_shapes, settings_of

_EXCLUSION_KEYS = ("modules_to_not_convert", "ignore")
_MAX_EXAMPLES = 3
_SAMPLE_SHAPE = (256, 256)
"""Shape of the matrix whose error is measured."""


def served_folder(run: Run) -> Path:
    """Return the folder of the checkpoint that the run's servers load."""
    return Path(run.rollout.model_path or run.model.path)


@dataclass(frozen=True)
class ServedWeights:
    """The form in which a run sends its weights to servers.

    Attributes:
        plain_type: name of the type of tensors that are not quantized.
        encoding: which tensors are quantized, and how; None if none is.
        hf: the parsed config.json of the served folder; empty if nothing is quantized.
        family: the family of the model; None if nothing is quantized.
    """

    plain_type: str
    encoding: WeightEncoding | None = None
    hf: HFConfig | None = None
    family: Family | None = None

    @classmethod
    def of(cls, run: Run) -> "ServedWeights":
        """Return the form of a run's pushes.

        Raises:
            DataError: the quantization of the served folder, or that of ``weights.encoding``, is not supported.
        """
        folder, name, plain = served_folder(run), run.weights.encoding, run.rollout.dtype or run.model.dtype
        if name == "none":
            return cls(plain)
        hf = read_hf_config(folder)
        held = hf.get(QUANTIZATION_CONFIG) or {}
        if name == "auto" and not held:
            return cls(plain)
        if name != "auto":
            excluded = next((held[key] for key in _EXCLUSION_KEYS if held.get(key)), ())
            hf = {**hf, QUANTIZATION_CONFIG: settings_of(name, excluded)}
        family = family_of(hf)
        stored = read_headers(folder) if holds_hf_files(folder) else None
        encoding = encoding_of(hf, family, stored)
        assert encoding is not None, "the configuration has a quantization"
        dtype = None if run.rollout.dtype is None else getattr(torch, run.rollout.dtype)
        require_shapes(encoding, family)
        return cls(plain, replace(encoding, plain_dtype=dtype), hf, family)

    @property
    def label(self) -> str:
        """The quantization in words; empty if nothing is quantized."""
        return "" if self.encoding is None else self.encoding.format.label

    @property
    def relative_error(self) -> float:
        """Norm of the error of a quantized matrix of normal numbers, relative to the norm of the matrix."""
        if self.encoding is None:
            return 0.0
        quantized, generator = self.encoding.format, torch.Generator().manual_seed(0)
        matrix = torch.randn(_SAMPLE_SHAPE, generator=generator)
        parts = quantized.encode(matrix)
        decoded = quantized.decode(parts[quantized.values_suffix], parts[quantized.scales_suffix])
        return float((decoded.float() - matrix).norm() / matrix.norm())

    def encoded(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in the form in which they are sent, each on the device of its source."""
        return iter(tensors) if self.encoding is None else self.encoding.encoded(tensors)

    def problem(self, method: str, settings: Mapping[str, Any] | None) -> str | None:
        """Return why a server cannot take these weights, and what to do; None if it can, as far as that is known.

        Args:
            method: name of the quantization that the server has; empty if it has none.
            settings: the ``quantization_config`` of its model; None if it is not known.
        """
        if self.encoding is None:
            return self._problem_of_plain(method, settings) if method else None
        if not method:
            return (
                f"holds weights that are not quantized, but the run would push {self.label} (weights.encoding); start"
                " it with a folder of that quantization (megatron-rl convert --encoding writes one), or"
                ' write weights.encoding = "none"'
            )
        if not settings:
            pushed = str((self.hf or {})[QUANTIZATION_CONFIG].get("quant_method"))
            names = (pushed, pushed.replace("-", "_"), "unknown")
            return None if method in names else self._problem_of_other(method)
        assert self.hf is not None, "belongs to the encoding"
        assert self.family is not None, "belongs to the encoding"
        try:
            held = encoding_of({**self.hf, QUANTIZATION_CONFIG: settings}, self.family)
        except DataError:
            return self._problem_of_other(method)
        assert held is not None, "there are settings"
        if held.format.label != self.label:
            return self._problem_of_other(held.format.label)
        if different := sorted(held.names ^ self.encoding.names):
            examples = ", ".join(different[:_MAX_EXAMPLES])
            return (
                f"quantizes other tensors than the run would push quantized: {len(different)} differ, such as"
                f" {examples}; write the server's model folder in rollout.model_path, whose exclusions are then used"
            )
        return None

    def folder_problems(self, folder: Path) -> Iterator[str]:
        """Yield how the tensors of the served folder differ from what a push would send."""
        if self.encoding is not None and self.family is not None and holds_hf_files(folder):
            yield from encoding_problems(self.encoding, self.family, read_headers(folder))

    def _problem_of_plain(self, method: str, settings: Mapping[str, Any] | None) -> str:
        return (
            f"holds quantized weights ({_label_of(method, settings)}), but the run would push {self.plain_type}"
            " tensors without scales: it would refuse them in the middle of a push, or read them as noise; write its"
            ' model folder in rollout.model_path with weights.encoding = "auto", or start it with a checkpoint that'
            " is not quantized"
        )

    def _problem_of_other(self, label: str) -> str:
        return (
            f"holds weights as {label}, but the run would push {self.label} (weights.encoding); write its model"
            ' folder in rollout.model_path with weights.encoding = "auto"'
        )


def _label_of(method: str, settings: Mapping[str, Any] | None) -> str:
    try:
        known = format_of({QUANTIZATION_CONFIG: settings}) if settings else None
    except DataError:
        known = None
    return method if known is None else known.label
