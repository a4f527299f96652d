"""A Hugging Face checkpoint folder as a ``CheckpointReader``: safetensors files, with or without an index.

Experts may be apart or fused in one tensor a layer, matrices may be FP8 or MXFP4 with a scale for each block: names,
shapes and values come out as the family's table has them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_reader import CheckpointReader, TensorSpec
from megatron_rl.models.fp8 import FP8Format
from megatron_rl.models.hf_mapping.rules import Family, FusedParam, HFConfig
from megatron_rl.models.mxfp4 import BLOCKS_SUFFIX, SCALES_SUFFIX, MXFP4Format
from megatron_rl.models.safetensor_files import FileTensor, read_header

INDEX = "model.safetensors.index.json"


class QuantizedFormat(Protocol):
    """How quantised tensors become bfloat16."""

    @property
    def scales_suffix(self) -> str:
        """What follows a tensor's name in that of its scales."""
        ...

    @property
    def keeps_scales(self) -> bool:
        """Whether the scales are also tensors by themselves, which go along to other checkpoints."""
        ...

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tensor's shape from that of its values in the file."""
        ...

    def scales_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that its scales must have; None: the values themselves have a wrong one."""
        ...

    def decoded(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the tensor."""
        ...


@dataclass(frozen=True)
class HFTensor:
    """Where a tensor's bytes are, and the scales of its blocks if it is quantised.

    Attributes:
        of: the tensor of the file that it is, or is a part of; and that of its scales.
    """

    of: str
    extent: FileTensor
    scales_of: str = ""
    scales: FileTensor | None = None
    coding: QuantizedFormat | None = None

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype once it is read."""
        if self.coding is None:
            return TensorSpec(self.extent.shape, self.extent.dtype)
        return TensorSpec(self.coding.shape(self.extent.shape), torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that belong to it alone."""
        own = self.scales if self.coding and not self.coding.keeps_scales else None
        return self.extent.num_bytes + (own.num_bytes if own else 0)

    def item(self, index: int) -> "HFTensor":
        """Return one slice along the first dimension, without that dimension."""
        scales = self.scales.item(index) if self.scales else None
        return replace(self, extent=self.extent.item(index), scales=scales)


class HFCheckpointReader(CheckpointReader):
    """The tensors of a Hugging Face folder under the names of the family's table.

    Attributes:
        files: every tensor as the files have it.
        pieces: every tensor as the table has it.
    """

    def __init__(self, folder: Path, family: Family, hf: HFConfig) -> None:
        self.folder = folder
        self.files = hf_tensors(folder)
        self.pieces = dict(_whole_pieces(self.files, hf))
        for joined in family.fused:
            _take_apart(self.pieces, joined, family)
        self.specs = {name: piece.spec for name, piece in self.pieces.items()}

        self.watch: Callable[[str, Tensor], None] = _ignore

    def describe_location(self, name: str) -> str:
        """See ``CheckpointReader``."""
        return f" (in {self.pieces[name].extent.path.name})"

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantised; ``watch`` is told the name in the file, and shown the bytes."""
        piece = self.pieces[name]
        values = piece.extent.read()
        self.watch(piece.of, values)
        if piece.scales is None or piece.coding is None:
            return values
        scales = piece.scales.read()
        if not piece.coding.keeps_scales:
            self.watch(piece.scales_of, scales)
        return piece.coding.decoded(values, scales)


def _ignore(name: str, values: Tensor) -> None:
    """Stand where nobody watches."""


def hf_tensors(folder: Path) -> dict[str, FileTensor]:
    """Return every tensor in the files of the folder.

    Raises:
        DataError: no files, an unreadable one, a tensor in two, or files that are not those of the index.
    """
    where: dict[str, FileTensor] = {}
    index = _index(folder)
    paths = sorted({folder / file for file in index.values()} if index else folder.glob("*.safetensors"))
    if not paths:
        raise DataError(f"no *.safetensors in {str(folder)!r} (model.path)")
    for path in paths:
        for name, extent in read_header(path).items():
            if name in where:
                raise DataError(f"tensor {name} is in {where[name].path.name} and again in {path.name} of {folder}")
            where[name] = extent
    for name, file in index.items():
        if name not in where or where[name].path != folder / file:
            raise DataError(f"{folder / INDEX} says that {name} is in {file}; it is not there")
    return where


def _index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor; empty if the folder has no index."""
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
            raise DataError(f"{path} puts {name} into {file!r}; a file of the same folder was expected")
        if not (folder / file).is_file():
            raise DataError(f"{path} names {file}, which is not in the folder")
    return weight_map


def _whole_pieces(files: Mapping[str, FileTensor], hf: HFConfig) -> dict[str, HFTensor]:
    """Return the tensors with their scales, if config.json says that they have some."""
    method, block = quantization_method(hf), fp8_block(hf)
    pieces: dict[str, HFTensor] = {}
    for name, extent in files.items():
        if block is not None and extent.dtype is torch.float8_e4m3fn:
            pieces[name] = _coded(files, name, name, FP8Format(block))
        elif method == "mxfp4" and name.endswith(BLOCKS_SUFFIX):
            stem = name.removesuffix(BLOCKS_SUFFIX)
            if stem in files:
                raise DataError(f"tensor {stem} is in the checkpoint, and again as {name}")
            pieces[stem] = _coded(files, name, stem, MXFP4Format())
        elif method != "mxfp4" or not name.endswith(SCALES_SUFFIX):
            pieces[name] = HFTensor(name, extent)
    return pieces


def _coded(files: Mapping[str, FileTensor], name: str, stem: str, coding: QuantizedFormat) -> HFTensor:
    """Return a quantised tensor, whose scales must be there and fit."""
    extent, scales = files[name], files.get(stem + coding.scales_suffix)
    expected = coding.scales_shape(extent.shape)
    if scales is None or scales.shape != expected:
        found = None if scales is None else list(scales.shape)
        raise DataError(
            f"{name} {list(extent.shape)} is quantised; its {stem + coding.scales_suffix} is {found}, not {expected}"
        )
    return HFTensor(name, extent, stem + coding.scales_suffix, scales, coding)


def quantization_method(hf: HFConfig) -> str | None:
    """Return ``fp8`` or ``mxfp4``, or None if the checkpoint is not quantised.

    Raises:
        DataError: another quantisation.
    """
    settings = hf.get("quantization_config")
    if not settings:
        return None
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method == "mxfp4":
        return method
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise DataError(
            f"quantization_config {method!r} with weight_block_size {block!r} of config.json cannot be read; fp8 with "
            "two block sizes and mxfp4 can, and checkpoints that are not quantised"
        )
    return "fp8"


def fp8_block(hf: HFConfig) -> tuple[int, int] | None:
    """Return the size of an FP8 block, (rows, columns); None if the checkpoint is not in FP8.

    Raises:
        DataError: a quantisation that is not known.
    """
    if quantization_method(hf) != "fp8":
        return None
    rows, columns = hf["quantization_config"]["weight_block_size"]
    return int(rows), int(columns)


def _take_apart(pieces: dict[str, HFTensor], joined: FusedParam, family: Family) -> None:
    """Replace the tensors of one joined form by their parts."""
    shapes = {part: name.shapes[index] for name in family.mappings for index, part in enumerate(name.hf)}
    experts, heights = family.num_experts, [shapes[part][0] for part in joined.parts]
    for layer in range(family.num_layers):
        name = joined.hf.format(layer=layer)
        if name not in pieces:
            continue
        piece = pieces.pop(name)
        if isinstance(piece.coding, FP8Format):
            raise DataError(f"{name} is FP8 and holds several matrices; FP8 is read of single matrices only")
        expected = (sum(heights), *shapes[joined.parts[0]][1:])
        expected = (experts, *expected) if joined.is_stacked else expected
        if piece.spec.shape != expected:
            raise DataError(f"misshapen: {name} is {list(piece.spec.shape)}, expected {list(expected)}")
        for expert in range(experts if joined.is_stacked else 1):
            matrix, row = piece.item(expert) if joined.is_stacked else piece, 0
            for part, height in zip(joined.parts, heights, strict=True):
                own = part.format(layer=layer, expert=expert)
                if own in pieces:
                    raise DataError(f"tensor {own} is in the checkpoint, and again as a part of {name}")
                alone = len(joined.parts) == 1
                pieces[own] = matrix if alone else replace(matrix, extent=matrix.extent.rows(row, height))
                row += height
