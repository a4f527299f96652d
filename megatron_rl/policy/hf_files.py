"""A Hugging Face checkpoint folder as a ``Source``: safetensors files, with or without an index.

Experts may be apart or fused in one tensor a layer, and matrices may be FP8 with a scale for each block: names, shapes
and values come out as the family's table has them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import DataError
from megatron_rl.policy.fp8 import SCALE_SUFFIX, dequantised, scales_shape
from megatron_rl.policy.names.rules import Family, HFConfig, Joined
from megatron_rl.policy.safetensor_files import Extent, read_header
from megatron_rl.policy.sources import Source, Spec

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Piece:
    """Where a tensor's bytes are, and the scales of its blocks if it is quantised.

    Attributes:
        of: the tensor of the file that it is, or is a part of.
    """

    of: str
    extent: Extent
    scales: Extent | None = None
    block: tuple[int, int] = (0, 0)

    @property
    def spec(self) -> Spec:
        """Shape and dtype once it is read."""
        return Spec(self.extent.shape, torch.bfloat16 if self.scales else self.extent.dtype)


class HFSource(Source):
    """The tensors of a Hugging Face folder under the names of the family's table.

    Attributes:
        files: every tensor as the files have it.
        pieces: every tensor as the table has it.
    """

    def __init__(self, folder: Path, family: Family, hf: HFConfig) -> None:
        self.folder = folder
        self.files = hf_tensors(folder)
        self.pieces = dict(_whole_pieces(self.files, hf))
        for joined in family.joined:
            _take_apart(self.pieces, joined, family)
        self.specs = {name: piece.spec for name, piece in self.pieces.items()}

        self.watch: Callable[[str, Tensor], None] = _ignore

    def whereabouts(self, name: str) -> str:
        """See ``Source``."""
        return f" (in {self.pieces[name].extent.path.name})"

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantised; ``watch`` is told the name in the file, and shown the bytes."""
        piece = self.pieces[name]
        values = piece.extent.read()
        self.watch(piece.of, values)
        if piece.scales is None:
            return values
        return dequantised(values, piece.scales.read(), piece.block)


def _ignore(name: str, values: Tensor) -> None:
    """Stand where nobody watches."""


def hf_tensors(folder: Path) -> dict[str, Extent]:
    """Return every tensor in the files of the folder.

    Raises:
        DataError: no files, an unreadable one, a tensor in two, or files that are not those of the index.
    """
    where: dict[str, Extent] = {}
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


def _whole_pieces(files: Mapping[str, Extent], hf: HFConfig) -> dict[str, Piece]:
    """Return the tensors with their scales, if config.json says that they have some."""
    block = fp8_block(hf)
    if block is None:
        return {name: Piece(name, extent) for name, extent in files.items()}
    pieces = {}
    for name, extent in files.items():
        if extent.dtype is not torch.float8_e4m3fn:
            pieces[name] = Piece(name, extent)
            continue
        scales = files.get(name + SCALE_SUFFIX)
        expected = scales_shape(extent.shape, block) if len(extent.shape) == 2 else None
        if scales is None or scales.shape != expected:
            found = None if scales is None else list(scales.shape)
            raise DataError(f"{name} {list(extent.shape)} is FP8; its {name + SCALE_SUFFIX} is {found}, not {expected}")
        pieces[name] = Piece(name, extent, scales, block)
    return pieces


def fp8_block(hf: HFConfig) -> tuple[int, int] | None:
    """Return the size of an FP8 block, (rows, columns); None if the checkpoint is not quantised.

    Raises:
        DataError: another quantisation.
    """
    settings = hf.get("quantization_config")
    if not settings:
        return None
    block = settings.get("weight_block_size")
    if settings.get("quant_method") != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise DataError(
            f"quantization_config {settings.get('quant_method')!r} with weight_block_size {block!r} of config.json "
            "cannot be read; fp8 with two block sizes can, and checkpoints that are not quantised"
        )
    return int(block[0]), int(block[1])


def _take_apart(pieces: dict[str, Piece], joined: Joined, family: Family) -> None:
    """Replace the tensors of one joined form by their parts."""
    shapes = {part: name.shapes[index] for name in family.names for index, part in enumerate(name.hf)}
    experts, heights = family.num_experts, [shapes[part][0] for part in joined.parts]
    for layer in range(family.num_layers):
        name = joined.hf.format(layer=layer)
        if name not in pieces:
            continue
        piece = pieces.pop(name)
        if piece.scales:
            raise DataError(f"{name} is FP8 and holds several matrices; FP8 is read of single matrices only")
        whole = piece.extent
        expected = (sum(heights), *shapes[joined.parts[0]][1:])
        expected = (experts, *expected) if joined.is_stacked else expected
        if whole.shape != expected:
            raise DataError(f"misshapen: {name} is {list(whole.shape)}, expected {list(expected)}")
        for expert in range(experts if joined.is_stacked else 1):
            matrix, row = whole.item(expert) if joined.is_stacked else whole, 0
            for part, height in zip(joined.parts, heights, strict=True):
                own = part.format(layer=layer, expert=expert)
                if own in pieces:
                    raise DataError(f"tensor {own} is in the checkpoint, and again as a part of {name}")
                pieces[own] = Piece(name, matrix.rows(row, height))
                row += height
