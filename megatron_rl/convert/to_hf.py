"""Conversion of torch_dist and training checkpoints to Hugging Face safetensors.

The files have the original layout if there is a manifest.
"""

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

from megatron_rl.config.encodings import EncodingName
from megatron_rl.convert.jobs import FileJob, ProgressFn, StagingFolder, check_disk_space, run_jobs
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
from megatron_rl.models.channel_fp8 import SCALE_SUFFIX as CHANNEL_SUFFIX
from megatron_rl.models.checkpoint_folders import (
    copy_companions,
    has_weights,
    holds_hf_files,
    open_checkpoint,
    write_hf_config,
)
from megatron_rl.models.checkpoint_reader import CheckpointReader
from megatron_rl.models.encodings import QUANTIZATION_CONFIG, WeightEncoding
from megatron_rl.models.fp8 import SCALE_SUFFIX, quantize, scales_shape
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, HFConfig
from megatron_rl.models.hf_reader import INDEX
from megatron_rl.models.int4 import INT4Format
from megatron_rl.models.mxfp4 import SCALES_SUFFIX, MXFP4Format
from megatron_rl.models.quantization_settings import named_encoding
from megatron_rl.models.quantized_format import QuantizedFormat
from megatron_rl.models.torch_dist import METADATA, is_torch_dist
from megatron_rl.models.training_checkpoint import META

SHARD_BYTES = 4 << 30
"""Size limit of a safetensors file."""
FP8_BLOCK = (128, 128)
_SCALE_SUFFIXES = (SCALE_SUFFIX, SCALES_SUFFIX, CHANNEL_SUFFIX)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
        name: Hugging Face name.
        file: file to write it to.
        dtype: dtype in the file.
        shape: shape in the file.
        parts: tensors of the source whose concatenated bytes are its content.
        block: FP8 block size, of a quantized matrix or of its scales as in the original; None for other tensors.
        encoding: format, and suffix of this tensor in it; None if the tensor is not encoded.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    block: tuple[int, int] | None = None
    encoding: tuple[QuantizedFormat, str] | None = None

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_parts(self, source: CheckpointReader) -> Iterator[Tensor]:
        """Yield the consecutive parts of the tensor."""
        if self.encoding is not None:
            quantized, suffix = self.encoding
            weights = [source.read(part) for part in self.parts]
            yield quantized.encode(weights[0] if len(weights) == 1 else torch.stack(weights))[suffix]
            return
        if self.block is None:
            yield from (source.read(part) for part in self.parts)
            return
        old = source.read(self.parts[0] + SCALE_SUFFIX) if self.parts[0] + SCALE_SUFFIX in source.specs else None
        yield quantize(source.read(self.parts[0]), self.block, old)[self.name.endswith(SCALE_SUFFIX)]


@dataclass(frozen=True)
class OutputFormat:
    """Options of the files to write.

    Attributes:
        fp8: quantize matrices to FP8 that were FP8 in the original, with its scales where they fit.
        encoding: name of the encoding of all tensors that it can hold; None: none.
        split_experts: write one tensor per expert, even if the original checkpoint had them fused.
    """

    fp8: bool = False
    split_experts: bool = False
    encoding: EncodingName | None = None


def convert(
    source_folder: Path, target: Path, output_format: OutputFormat, threads: int, console: Console
) -> tuple[Manifest, int]:
    """Write a torch_dist or training checkpoint to ``target`` as a Hugging Face folder.

    Returns:
        the manifest, and the number of tensors with the same bytes as in the original Hugging Face checkpoint.

    Raises:
        ConfigError: the model family is unknown, or the target exists.
        DataError: a tensor is missing, unexpected or has the wrong shape, or a file is damaged.
    """
    stamp = _stamp(source_folder)
    hf = read_hf_config(source_folder)
    family = family_of(hf)
    if family.stacked_names and (output_format.fp8 or output_format.split_experts):
        raise ConfigError(
            f"model_type {hf['model_type']!r} has the experts of a layer in one tensor only: they cannot be "
            "split, nor quantized to FP8, which needs single matrices; leave out --split-experts and --fp8"
        )
    source = open_checkpoint(source_folder, family)
    source.check(family)
    original = read_manifest(source_folder)
    settings: HFConfig = {}
    if output_format.encoding:
        encoding = named_encoding(output_format.encoding, hf, family)
        settings = {QUANTIZATION_CONFIG: encoding.settings}
        tensors = _assign_files(list(_encoded(source, family, encoding.encoding)))
    else:
        tensors = _output_tensors(source, family, original, output_format)
    files: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    jobs = [
        FileJob(file, sum(tensor.num_bytes for tensor in content), partial(_write_file, source, content))
        for file, content in files.items()
    ]
    plan = {
        "to": "hf",
        "wanted": [output_format.fp8, output_format.split_experts, output_format.encoding],
        "source": stamp,
    }
    staging = StagingFolder(target, plan)
    check_disk_space(target.parent, sum(tensor.num_bytes for tensor in tensors))
    records = run_jobs(staging, jobs, threads, console)
    copy_companions(source_folder, staging.folder)
    block = next((tensor.block for tensor in tensors if tensor.block), None)
    _write_json_files(staging.folder, tensors, {**hf, **settings, **_quantization(block)})
    entries = [entry for record in records for entry in record.rows]
    manifest = write_manifest(staging.folder, hf, entries, "megatron-to-hf", fp8_block=block)
    staging.publish()
    before = {entry.name: entry.sha256 for entry in original.tensors} if original else {}
    return manifest, sum(before.get(entry.name) == entry.sha256 for entry in manifest.tensors)


def _stamp(folder: Path) -> list[int]:
    """Return size and time of the file that is written last; a conversion of another source starts over.

    Raises:
        DataError: the folder is neither a torch_dist nor a training checkpoint.
    """
    if holds_hf_files(folder):
        hint = (
            "it has the weights in Hugging Face format already"
            if has_weights(folder)
            else "give a run folder, a training checkpoint or a torch_dist checkpoint"
        )
        raise DataError(f"{folder} holds no torch_dist and no training checkpoint; {hint}")
    written = (folder / (METADATA if is_torch_dist(folder) else META)).stat()
    return [written.st_size, written.st_mtime_ns]


def _quantization(block: tuple[int, int] | None) -> HFConfig:
    if block is None:
        return {}
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return {QUANTIZATION_CONFIG: settings}


def _output_tensors(
    source: CheckpointReader, family: Family, original: Manifest | None, output_format: OutputFormat
) -> list[OutputTensor]:
    """Return the tensors to write: those of the original checkpoint, or one for each name of the model family."""
    if original is not None and original.conversion == "hf-to-megatron":
        block = original.fp8_block or FP8_BLOCK
        fused = family.fused_parts()
        tensors = [
            tensor
            for entry in original.tensors
            for tensor in _as_in_original(entry, source, fused, output_format, block)
        ]
        used = {part for tensor in tensors for part in tensor.parts}
        if lost := [name for name in source.specs if name not in used and not name.endswith(SCALE_SUFFIX)]:
            raise DataError(
                f"the manifest in {source.folder} does not account for {lost[0]}; remove it to convert without"
            )
        return tensors
    matrices = fp8_matrices(family) if output_format.fp8 else frozenset()
    quantized = [
        part
        for tensor in _unfused(source, family)
        for part in _in_fp8(tensor, FP8_BLOCK if tensor.name in matrices else None)
    ]
    return _assign_files(quantized)


def _encoded(source: CheckpointReader, family: Family, encoding: WeightEncoding) -> Iterator[OutputTensor]:
    """Yield one tensor per name of the model family, and instead of a quantized one its values and scales."""
    for tensor in _unfused(source, family):
        if tensor.name not in encoding.names:
            yield tensor
            continue
        for suffix, (shape, dtype) in (encoding.format.layout(tensor.shape) or {}).items():
            name, part = tensor.name + suffix, (encoding.format, suffix)
            yield replace(tensor, name=name, shape=shape, dtype=dtype, encoding=part)


def _unfused(source: CheckpointReader, family: Family) -> Iterator[OutputTensor]:
    """Yield one tensor per name of the model family; experts that Hugging Face only has stacked become one tensor."""
    stacks = family.fused_parts(required=True)
    firsts = {parts[0]: (stack, parts) for stack, parts in stacks.items()}
    others = {part for parts in stacks.values() for part in parts[1:]}
    for name, spec in source.specs.items():
        if name in firsts:
            stack, parts = firsts[name]
            yield OutputTensor(stack, "", spec.dtype, (len(parts), *spec.shape), parts)
        elif name not in others and not name.endswith(SCALE_SUFFIX):
            yield OutputTensor(name, "", spec.dtype, spec.shape, (name,))


def _as_in_original(
    entry: ManifestEntry,
    source: CheckpointReader,
    fused: Mapping[str, tuple[str, ...]],
    output_format: OutputFormat,
    block: tuple[int, int],
) -> Iterator[OutputTensor]:
    names = source.specs.keys() | fused.keys()
    if any(entry.name.endswith(end) and entry.name.removesuffix(end) in names for end in _SCALE_SUFFIXES):
        return  # written with its matrix, if at all
    for quantized in (MXFP4Format(), INT4Format()):
        stem = entry.name.removesuffix(quantized.values_suffix)
        if stem != entry.name and stem in names:  # written in bfloat16
            entry = entry.model_copy(update={"name": stem, "shape": quantized.shape(entry.shape)})
    parts = fused.get(entry.name, (entry.name,))
    if unknown := [part for part in parts if part not in source.specs]:
        raise DataError(f"the manifest in {source.folder} names {unknown[0]}, which is not in the checkpoint")
    specs = [source.specs[part] for part in parts]
    if output_format.split_experts:
        for part, spec in zip(parts, specs, strict=True):
            yield OutputTensor(part, entry.file, spec.dtype, spec.shape, (part,))
        return
    tensor = OutputTensor(entry.name, entry.file, specs[0].dtype, entry.shape, parts)
    if sum(spec.num_bytes for spec in specs) != tensor.num_bytes:
        raise DataError(
            f"the manifest in {source.folder} says that {entry.name} has shape {list(entry.shape)}; its parts do not"
        )
    yield from _in_fp8(tensor, block if output_format.fp8 and dtype_of(entry.dtype) is torch.float8_e4m3fn else None)


def _in_fp8(tensor: OutputTensor, block: tuple[int, int] | None) -> Iterator[OutputTensor]:
    if block is None:
        yield tensor
        return
    yield replace(tensor, dtype=torch.float8_e4m3fn, block=block)
    shape = scales_shape(tensor.shape, block)
    yield replace(tensor, name=tensor.name + SCALE_SUFFIX, dtype=torch.float32, shape=shape, block=block)


def fp8_matrices(family: Family) -> frozenset[str]:
    """Return the names of the tensors to quantize: all matrices except embedding, output head and routers."""
    return frozenset(
        hf_name
        for name in family.mappings
        if "linear_" in name.megatron and len(name.shapes[0]) == 2
        for layer, expert in name.instances()
        for hf_name in name.hf_names(layer, expert)
    )


def _assign_files(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Return the tensors with their files, of at most ``SHARD_BYTES`` each, assigned in order."""
    numbers: list[int] = []
    used, number = 0, 1
    for tensor in tensors:
        if used and used + tensor.num_bytes > SHARD_BYTES:
            number, used = number + 1, 0
        numbers.append(number)
        used += tensor.num_bytes
    if number == 1:
        return [replace(tensor, file="model.safetensors") for tensor in tensors]
    pairs = zip(tensors, numbers, strict=True)
    return [replace(tensor, file=f"model-{index:05}-of-{number:05}.safetensors") for tensor, index in pairs]


def _write_file(
    source: CheckpointReader, tensors: Sequence[OutputTensor], output: BinaryIO, report: ProgressFn
) -> FileRecord:
    """Write one safetensors file and return its manifest entries."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.num_bytes],
        }
        end += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output.write(len(text).to_bytes(8, "little") + text)
    reader = source.for_thread()
    entries: list[ManifestEntry] = []
    for tensor in tensors:
        digest = hashlib.sha256()
        for piece in tensor.read_parts(reader):
            content = piece.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            output.write(content)
            report(len(content))
        entry = ManifestEntry(
            name=tensor.name,
            file=tensor.file,
            dtype=dtype_name(tensor.dtype),
            shape=tensor.shape,
            sha256=digest.hexdigest(),
            to=tensor.parts,
        )
        entries.append(entry)
    return FileRecord(rows=tuple(entries))


def _write_json_files(folder: Path, tensors: Sequence[OutputTensor], hf: HFConfig) -> None:
    """Write the index if there are several files, and config.json if it has changed."""
    if len({tensor.file for tensor in tensors}) > 1 or tensors[0].file != "model.safetensors":
        weight_map = {tensor.name: tensor.file for tensor in sorted(tensors, key=lambda tensor: tensor.name)}
        index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if QUANTIZATION_CONFIG in hf:
        write_hf_config(folder, hf)
