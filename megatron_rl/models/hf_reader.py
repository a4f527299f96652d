"""Reads Hugging Face checkpoint folders: safetensors files with or without an index.

Experts may be separate or fused into one tensor per layer. Matrices may be quantized, see ``encodings.format_of``. The
reader returns the names, shapes and values of the family's table in either case.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_reader import CheckpointReader, TensorSpec
from megatron_rl.models.encodings import format_of
from megatron_rl.models.fp8 import FP8Format
from megatron_rl.models.hf_mapping.rules import Family, FusedParam, HFConfig
from megatron_rl.models.int4 import SHAPE_SUFFIX, INT4Format
from megatron_rl.models.mxfp4 import MXFP4Format
from megatron_rl.models.quantized_format import QuantizedFormat
from megatron_rl.models.safetensor_files import FileTensor, read_header

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HFTensor:
    """The location of a tensor of the table, and of its scales if it is quantized.

    Attributes:
        stored_name: name of the tensor in the file; the tensor is all of it or a slice.
        values: location of the bytes.
        scales_name: name of the scales in the file; empty if the tensor is not quantized.
        scales: location of the scales.
        quantization: decodes values and scales.
    """

    stored_name: str
    values: FileTensor
    scales_name: str = ""
    scales: FileTensor | None = None
    quantization: QuantizedFormat | None = None

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype after decoding."""
        if self.quantization is None:
            return TensorSpec(self.values.shape, self.values.dtype)
        return TensorSpec(self.quantization.shape(self.values.shape), torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file that belong to this tensor only."""
        scales = self.scales if self.quantization and not self.quantization.keeps_scales else None
        return self.values.num_bytes + (scales.num_bytes if scales else 0)

    def item(self, index: int) -> "HFTensor":
        """Return one slice along the first dimension, without that dimension."""
        scales = self.scales.item(index) if self.scales else None
        return replace(self, values=self.values.item(index), scales=scales)


class HFCheckpointReader(CheckpointReader):
    """Reads the tensors of a Hugging Face folder.

    Attributes:
        stored: location of every tensor, by name in the files.
        tensors: location of every tensor, by name in the family's table.
        on_read: called with the name in the file and the stored values whenever a tensor is read.
    """

    def __init__(self, folder: Path, family: Family, hf: HFConfig) -> None:
        self.folder = folder
        self.stored = read_headers(folder)
        self.tensors = _with_scales(self.stored, hf)
        for fused in family.fused:
            _split_fused(self.tensors, fused, family)
        self.specs = {name: tensor.spec for name, tensor in self.tensors.items()}
        self.on_read: Callable[[str, Tensor], None] = lambda name, values: None

    def describe_location(self, name: str) -> str:
        """Return the file that contains a tensor, formatted for an error message."""
        return f" (in {self.tensors[name].values.path.name})"

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized if necessary, on the CPU."""
        tensor = self.tensors[name]
        values = tensor.values.read()
        self.on_read(tensor.stored_name, values)
        if tensor.scales is None or tensor.quantization is None:
            return values
        scales = tensor.scales.read()
        if not tensor.quantization.keeps_scales:
            self.on_read(tensor.scales_name, scales)
        return tensor.quantization.decode(values, scales)


def read_headers(folder: Path) -> dict[str, FileTensor]:
    """Return the location of every tensor in the safetensors files of a folder.

    Raises:
        DataError: there is no file, a file cannot be read, a tensor is in two files, or the index does not match.
    """
    found: dict[str, FileTensor] = {}
    index = _index(folder)
    paths = sorted({folder / file for file in index.values()} if index else folder.glob("*.safetensors"))
    if not paths:
        raise DataError(f"no *.safetensors in {str(folder)!r} (model.path)")
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in found:
                raise DataError(f"tensor {name} is in {found[name].path.name} and again in {path.name} of {folder}")
            found[name] = tensor
    for name, file in index.items():
        if name not in found or found[name].path != folder / file:
            raise DataError(f"{folder / INDEX} says that {name} is in {file}; it is not there")
    return found


def _index(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor; empty if the folder has no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{path} has no weight_map from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise DataError(f"{path} maps {name} to {file!r}; expected the name of a file in the same folder")
        if not (folder / file).is_file():
            raise DataError(f"{path} names {file}, which is not in the folder")
    return weight_map


def _with_scales(stored: Mapping[str, FileTensor], hf: HFConfig) -> dict[str, HFTensor]:
    """Return all tensors, combined with their scales if config.json declares a quantization."""
    quantized = format_of(hf)
    if quantized is None:
        return {name: HFTensor(name, values) for name, values in stored.items()}
    stems = {stem: name for name, values in stored.items() if (stem := _stem(name, values, quantized)) is not None}
    side = {stem + suffix for stem in stems for suffix in _side_suffixes(quantized)}
    tensors = {name: HFTensor(name, values) for name, values in stored.items() if name not in side}
    for stem, name in stems.items():
        if stem != name and stem in stored:
            raise DataError(f"tensor {stem} is in the checkpoint, and again as {name}")
        tensors.pop(name)
        tensors[stem] = _quantized(stored, name, stem, quantized)
    return tensors


def _stem(name: str, values: FileTensor, quantized: QuantizedFormat) -> str | None:
    """Return the name of the tensor whose values these are; None if they are not quantized."""
    if quantized.values_suffix:
        return name.removesuffix(quantized.values_suffix) if name.endswith(quantized.values_suffix) else None
    return name if values.dtype is torch.float8_e4m3fn else None


def _side_suffixes(quantized: QuantizedFormat) -> tuple[str, ...]:
    """Return the suffixes of the tensors that are stored with the values and are no tensors of the checkpoint."""
    if quantized.keeps_scales:
        return ()
    return (quantized.scales_suffix, SHAPE_SUFFIX) if isinstance(quantized, INT4Format) else (quantized.scales_suffix,)


def _quantized(stored: Mapping[str, FileTensor], name: str, stem: str, quantization: QuantizedFormat) -> HFTensor:
    """Return a quantized tensor after checking that its scales exist and have the expected shape."""
    scales_name = stem + quantization.scales_suffix
    values, scales = stored[name], stored.get(scales_name)
    expected = quantization.scales_shape(values.shape)
    if scales is None or scales.shape != expected:
        found = None if scales is None else list(scales.shape)
        raise DataError(f"{name} {list(values.shape)} is quantized; its {scales_name} is {found}, not {expected}")
    return HFTensor(name, values, scales_name, scales, quantization)


def fp8_block(hf: HFConfig) -> tuple[int, int] | None:
    """Return the size of an FP8 block, (rows, columns); None if the checkpoint is not FP8.

    Raises:
        DataError: the quantization is not supported.
    """
    quantized = format_of(hf)
    return quantized.block if isinstance(quantized, FP8Format) else None


def _split_fused(tensors: dict[str, HFTensor], fused: FusedParam, family: Family) -> None:
    """Replace the tensors of one fused form by their parts."""
    shapes = {part: mapping.shapes[index] for mapping in family.mappings for index, part in enumerate(mapping.hf)}
    num_experts, heights = family.num_experts, [shapes[part][0] for part in fused.parts]
    for layer in range(family.num_layers):
        name = fused.hf.format(layer=layer)
        if name not in tensors:
            continue
        tensor = tensors.pop(name)
        if tensor.quantization is not None and not isinstance(tensor.quantization, MXFP4Format):
            label = tensor.quantization.label
            raise DataError(f"{name} is {label} and fuses several matrices; only single matrices are supported")
        expected = (sum(heights), *shapes[fused.parts[0]][1:])
        expected = (num_experts, *expected) if fused.is_stacked else expected
        if tensor.spec.shape != expected:
            raise DataError(f"wrong shape: {name} is {list(tensor.spec.shape)}, expected {list(expected)}")
        for expert in range(num_experts if fused.is_stacked else 1):
            matrix, row = tensor.item(expert) if fused.is_stacked else tensor, 0
            for part, height in zip(fused.parts, heights, strict=True):
                part_name = part.format(layer=layer, expert=expert)
                if part_name in tensors:
                    raise DataError(f"tensor {part_name} is in the checkpoint, and again as a part of {name}")
                is_only_part = len(fused.parts) == 1
                values = matrix.values if is_only_part else matrix.values.rows(row, height)
                tensors[part_name] = replace(matrix, values=values)
                row += height
