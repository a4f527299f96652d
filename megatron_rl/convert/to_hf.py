"""megatron-core -> Hugging Face: safetensors files, as the weights once came if a manifest tells."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from megatron_rl.convert.jobs import FileJob, ProgressFn, Staging, enough_room, run_jobs
from megatron_rl.convert.manifest import (
    FileRecord,
    Manifest,
    ManifestEntry,
    dtype_name,
    dtype_of,
    read_manifest,
    write_manifest,
)
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.models.checkpoint_folders import QUANTIZATION_CONFIG, copy_companions, write_hf_config
from megatron_rl.models.fp8 import SCALE_SUFFIX, quantize, scales_shape
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, HFConfig
from megatron_rl.models.hf_reader import INDEX
from megatron_rl.models.mxfp4 import BLOCKS_SUFFIX, SCALES_SUFFIX, MXFP4Format
from megatron_rl.models.torch_dist import METADATA, is_torch_dist
from megatron_rl.models.torch_dist_reader import TorchDistReader

SHARD_BYTES = 4 << 30
FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
        parts: tensors of the source whose bytes, one after the other, are its own.
        block: of FP8, for its values, or for its scales if it is named like them; None: as it is.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    block: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, source: TorchDistReader) -> Iterator[Tensor]:
        """Yield the tensor, in pieces that follow each other."""
        if self.block is None:
            yield from (source.read(part) for part in self.parts)
            return
        old = source.read(self.parts[0] + SCALE_SUFFIX) if self.parts[0] + SCALE_SUFFIX in source.specs else None
        yield quantize(source.read(self.parts[0]), self.block, old)[self.name.endswith(SCALE_SUFFIX)]


@dataclass(frozen=True)
class OutputFormat:
    """What the files shall be like: FP8 or not, experts always apart or as they once came."""

    fp8: bool = False
    apart: bool = False


def convert(
    source_folder: Path, target: Path, output_format: OutputFormat, threads: int, console: Console
) -> tuple[Manifest, int]:
    """Write ``target``, a Hugging Face folder, from a distributed checkpoint.

    Returns:
        the manifest, and how many tensors have the same bytes as in the checkpoint that the weights once came from.

    Raises:
        ConfigError: a family that is not known, or a target that is there.
        DataError: a tensor is missing, extra or misshapen, or a file is damaged.
    """
    if not is_torch_dist(source_folder):
        raise DataError(f"{source_folder} holds no distributed checkpoint: there is no {METADATA}")
    hf = read_hf_config(source_folder)
    family = family_of(hf)
    if family.stacked_names and (output_format.fp8 or output_format.apart):
        raise ConfigError(
            f"model_type {hf['model_type']!r} has the experts of a layer in one tensor only: they cannot be written "
            "apart, nor in FP8, which is for single matrices; leave out --apart and --fp8"
        )
    source = TorchDistReader(source_folder, family)
    source.check(family)
    came = read_manifest(source_folder)
    outs = _planned(source, family, came, output_format)
    files: dict[str, list[OutputTensor]] = {}
    for out in outs:
        files.setdefault(out.file, []).append(out)
    jobs = [
        FileJob(file, sum(out.num_bytes for out in own), partial(_write_file, source, own))
        for file, own in files.items()
    ]
    stamp = (source_folder / METADATA).stat()
    plan = {
        "to": "hf",
        "wanted": [output_format.fp8, output_format.apart],
        "source": [stamp.st_size, stamp.st_mtime_ns],
    }
    staging = Staging(target, plan)
    enough_room(target.parent, sum(out.num_bytes for out in outs))
    records = run_jobs(staging, jobs, threads, console)
    copy_companions(source_folder, staging.folder)
    block = next((out.block for out in outs if out.block), None)
    _write_json_files(staging.folder, outs, {**hf, **_quantization(block)})
    rows = [row for record in records for row in record.rows]
    manifest = write_manifest(staging.folder, hf, rows, "megatron-to-hf", fp8_block=block)
    staging.publish()
    before = {row.name: row.sha256 for row in came.tensors} if came else {}
    return manifest, sum(before.get(row.name) == row.sha256 for row in manifest.tensors)


def _quantization(block: tuple[int, int] | None) -> HFConfig:
    if block is None:
        return {}
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return {QUANTIZATION_CONFIG: settings}


def _planned(
    source: TorchDistReader, family: Family, came: Manifest | None, output_format: OutputFormat
) -> list[OutputTensor]:
    """Return all tensors to write: those that the weights came as, or one for each name of the table."""
    if came is not None and came.conversion == "hf-to-megatron":
        block = came.fp8_block or FP8_BLOCK
        joined = family.fused_parts()
        outs = [out for row in came.tensors for out in _as_it_came(row, source, joined, output_format, block)]
        given = {part for out in outs for part in out.parts}
        if lost := [name for name in source.specs if name not in given and not name.endswith(SCALE_SUFFIX)]:
            raise DataError(f"the manifest in {source.folder} does not account for {lost[0]}; remove it to do without")
        return outs
    matrices = _matrices(family) if output_format.fp8 else frozenset()
    quantised_or_not = [
        part for out in _plain(source, family) for part in _in_fp8(out, FP8_BLOCK if out.name in matrices else None)
    ]
    return _in_files(quantised_or_not)


def _plain(source: TorchDistReader, family: Family) -> Iterator[OutputTensor]:
    """Yield the tensors of the table; in place of the first of those that only come stacked, the stack."""
    stacks = family.fused_parts(required=True)
    firsts = {parts[0]: (stack, parts) for stack, parts in stacks.items()}
    others = {part for parts in stacks.values() for part in parts[1:]}
    for name, spec in source.specs.items():
        if name in firsts:
            stack, parts = firsts[name]
            yield OutputTensor(stack, "", spec.dtype, (len(parts), *spec.shape), parts)
        elif name not in others and not name.endswith(SCALE_SUFFIX):
            yield OutputTensor(name, "", spec.dtype, spec.shape, (name,))


def _as_it_came(
    row: ManifestEntry,
    source: TorchDistReader,
    joined: Mapping[str, tuple[str, ...]],
    output_format: OutputFormat,
    block: tuple[int, int],
) -> Iterator[OutputTensor]:
    if row.name.removesuffix(SCALE_SUFFIX) in source.specs and row.name.endswith(SCALE_SUFFIX):
        return  # it comes with its matrix, or not at all
    if row.name.endswith(SCALES_SUFFIX) and row.name.removesuffix(SCALES_SUFFIX) in joined:
        return
    if row.name.endswith(BLOCKS_SUFFIX) and (stem := row.name.removesuffix(BLOCKS_SUFFIX)) in joined:
        row = row.model_copy(update={"name": stem, "shape": MXFP4Format().shape(row.shape)})  # written as it was read
    parts = joined.get(row.name, (row.name,))
    if unknown := [part for part in parts if part not in source.specs]:
        raise DataError(f"the manifest in {source.folder} names {unknown[0]}, which the checkpoint does not have")
    specs = [source.specs[part] for part in parts]
    if output_format.apart:
        for part, spec in zip(parts, specs, strict=True):
            yield OutputTensor(part, row.file, spec.dtype, spec.shape, (part,))
        return
    out = OutputTensor(row.name, row.file, specs[0].dtype, row.shape, parts)
    if sum(spec.num_bytes for spec in specs) != out.num_bytes:
        raise DataError(f"the manifest in {source.folder} says {row.name} is {list(row.shape)}; its parts differ")
    yield from _in_fp8(out, block if output_format.fp8 and dtype_of(row.dtype) is torch.float8_e4m3fn else None)


def _in_fp8(out: OutputTensor, block: tuple[int, int] | None) -> Iterator[OutputTensor]:
    if block is None:
        yield out
        return
    yield replace(out, dtype=torch.float8_e4m3fn, block=block)
    shape = scales_shape(out.shape, block)
    yield replace(out, name=out.name + SCALE_SUFFIX, dtype=torch.float32, shape=shape, block=block)


def _matrices(family: Family) -> frozenset[str]:
    """Return the tensors that FP8 is for: all matrices but embedding, head and routers."""
    return frozenset(
        hf_name
        for name in family.mappings
        if "linear_" in name.megatron and len(name.shapes[0]) == 2
        for layer, expert in name.instances()
        for hf_name in name.hf_names(layer, expert)
    )


def _in_files(outs: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Return the tensors spread over files of at most ``SHARD_BYTES``."""
    numbers: list[int] = []
    used, number = 0, 1
    for out in outs:
        if used and used + out.num_bytes > SHARD_BYTES:
            number, used = number + 1, 0
        numbers.append(number)
        used += out.num_bytes
    if number == 1:
        return [replace(out, file="model.safetensors") for out in outs]
    pairs = zip(outs, numbers, strict=True)
    return [replace(out, file=f"model-{own:05}-of-{number:05}.safetensors") for out, own in pairs]


def _write_file(
    source: TorchDistReader, outs: Sequence[OutputTensor], output: BinaryIO, report: ProgressFn
) -> FileRecord:
    """Write one safetensors file; return the rows of the manifest."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for out in outs:
        header[out.name] = {
            "dtype": dtype_name(out.dtype),
            "shape": out.shape,
            "data_offsets": [end, end + out.num_bytes],
        }
        end += out.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little") + text)
    reader = source.for_thread()
    rows: list[ManifestEntry] = []
    for out in outs:
        digest = hashlib.sha256()
        for piece in out.pieces(reader):
            content = piece.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            output.write(content)
            report(len(content))
        row = ManifestEntry(
            name=out.name,
            file=out.file,
            dtype=dtype_name(out.dtype),
            shape=out.shape,
            sha256=digest.hexdigest(),
            to=out.parts,
        )
        rows.append(row)
    return FileRecord(rows=tuple(rows))


def _write_json_files(folder: Path, outs: Sequence[OutputTensor], hf: HFConfig) -> None:
    """Write the index, where there are several files, and config.json, where it has changed."""
    if len({out.file for out in outs}) > 1 or outs[0].file != "model.safetensors":
        weight_map = {out.name: out.file for out in sorted(outs, key=lambda out: out.name)}
        index = {"metadata": {"total_size": sum(out.num_bytes for out in outs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if QUANTIZATION_CONFIG in hf:
        write_hf_config(folder, hf)
