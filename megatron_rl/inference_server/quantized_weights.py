"""The quantized tensors of a served checkpoint, as they are stored; the model computes with what they decode to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import holds_hf_files
from megatron_rl.models.encodings import (
    QUANTIZATION_CONFIG,
    EncodedSpecs,
    WeightEncoding,
    encoding_of,
    encoding_problems,
    served_shapes,
)
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import HFConfig
from megatron_rl.models.hf_reader import read_headers


@dataclass(frozen=True)
class QuantizedWeights:
    """Quantized tensors by their names in the checkpoint.

    Attributes:
        settings: the ``quantization_config`` of the checkpoint.
        encoding: which tensors are quantized, and how.
        specs: shape and dtype of each quantized tensor and its scales.
        tensors: values and scales by name.
        weights: name of each quantized tensor -> the weight that it is a part of.
    """

    settings: HFConfig
    encoding: WeightEncoding
    specs: EncodedSpecs
    tensors: dict[str, Tensor]
    weights: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> "QuantizedWeights | None":
        """Return the quantized tensors of a folder; None if its checkpoint is not quantized.

        Raises:
            DataError: the quantization is not supported, or the files do not match it.
        """
        hf = read_hf_config(folder)
        if not hf.get(QUANTIZATION_CONFIG) or not holds_hf_files(folder):
            return None
        family, stored = family_of(hf), read_headers(folder)
        encoding = encoding_of(hf, family, stored)
        assert encoding is not None, "the configuration has a quantization"
        if (problem := next(encoding_problems(encoding, family, stored), None)) is not None:
            raise DataError(f"{folder} does not match its quantization_config: {problem}; copy the checkpoint again")
        shapes, tensors = served_shapes(family), dict[str, Tensor]()
        specs = encoding.specs(shapes)
        weights = {name + end: name for name in encoding.names for end in encoding.format.layout(shapes[name]) or ()}
        for file in sorted({stored[name].path for name in specs}):
            with safe_open(file, "pt", device=str(device)) as opened:
                tensors |= {name: opened.get_tensor(name) for name in specs if stored[name].path == file}
        return cls(hf[QUANTIZATION_CONFIG], encoding, specs, tensors, weights)

    def install(self, changed: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> None:
        """Replace tensors, and decode the weights that are made of them to the model's."""
        self.tensors.update({name: tensor.to(self.tensors[name].device) for name, tensor in changed.items()})
        quantized = self.encoding.format
        for weight in {self.weights[name] for name in changed}:
            values, scales = (self.tensors[weight + end] for end in (quantized.values_suffix, quantized.scales_suffix))
            views[weight].copy_(quantized.decode(values, scales))
