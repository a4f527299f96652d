"""Conversion from Hugging Face to megatron-core: one file per layer, with unsharded tensors for use in any layout."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from megatron_rl.convert.jobs import FileJob, ProgressFn, StagingFolder, check_disk_space, run_jobs
from megatron_rl.convert.manifest import (
    FileRecord,
    Manifest,
    ManifestEntry,
    TensorChunks,
    dtype_name,
    dtype_of,
    write_manifest,
)
from megatron_rl.errors import DataError
from megatron_rl.models.checkpoint_folders import copy_companions
from megatron_rl.models.hf_mapping import family_of, read_hf_config
from megatron_rl.models.hf_mapping.rules import Family, ParamMapping
from megatron_rl.models.hf_reader import HFCheckpointReader, fp8_block
from megatron_rl.models.torch_dist import StoredTensor, TensorChunk, write_metadata, write_tensor
from megatron_rl.models.torch_dist_reader import PASSTHROUGH_PREFIX, checkpoint_slice


@dataclass
class FileContents:
    """Tensors of one output file.

    Attributes:
        mapped: (mapping, layer, expert) of each Megatron tensor.
        passthrough: Hugging Face names of tensors to copy, which the model does not use.
    """

    mapped: list[tuple[ParamMapping, int, int]] = field(default_factory=list)
    passthrough: list[str] = field(default_factory=list)

    def hf_names(self) -> Iterator[str]:
        """Yield the names of all Hugging Face tensors in the file."""
        for name, layer, expert in self.mapped:
            yield from name.hf_names(layer, expert)
        yield from self.passthrough


def convert(source_folder: Path, target: Path, threads: int, console: Console) -> Manifest:
    """Write a Hugging Face checkpoint to ``target`` as a distributed checkpoint with a manifest; return the manifest.

    Raises:
        ConfigError: the model family is unknown, or the target exists.
        DataError: a tensor is missing, unexpected, duplicated or has the wrong shape, or a file is damaged.
    """
    hf = read_hf_config(source_folder)
    family = family_of(hf)
    source = HFCheckpointReader(source_folder, family, hf)
    source.check(family)
    contents_of_files = _files(source, family)
    _check_dtypes(source, family)
    files = {e.path.name: e.path.stat() for e in source.stored.values()}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    jobs = []
    for number, contents in enumerate(contents_of_files):
        size = sum(source.tensors[name].num_bytes for name in contents.hf_names())
        file = f"__{number}_0.distcp"
        jobs.append(FileJob(file, size, partial(_write_file, source, family, contents, file)))
    staging = StagingFolder(target, {"to": "megatron", "files": stamps})
    check_disk_space(target.parent, sum(spec.num_bytes for spec in source.specs.values()))
    records = run_jobs(staging, jobs, threads, console)
    write_metadata(staging.folder, _all_tensors(records))
    copy_companions(source_folder, staging.folder)
    # In the order of the source files, so that the conversion back can reproduce them.
    entries = sorted((entry for record in records for entry in record.rows), key=lambda entry: _position(source, entry))
    manifest = write_manifest(staging.folder, hf, entries, "hf-to-megatron", fp8_block=fp8_block(hf))
    staging.publish()
    return manifest


def _position(source: HFCheckpointReader, entry: ManifestEntry) -> tuple[str, int]:
    """Return the file and the byte offset of a tensor."""
    extent = source.stored[entry.name]
    return extent.path.name, extent.offset


def _files(source: HFCheckpointReader, family: Family) -> list[FileContents]:
    """Return the files to write: tensors outside of layers, then each layer, then passthrough tensors."""
    ends, layers = FileContents(), defaultdict[int, FileContents](FileContents)
    for name in family.mappings:
        for layer, expert in name.instances():
            contents = layers[layer] if "{layer}" in name.megatron else ends
            contents.mapped.append((name, layer, expert))
    passthrough = [name for name in source.specs if source.is_passthrough(name, family)]
    return [
        ends,
        *(layers[layer] for layer in sorted(layers)),
        *([FileContents(passthrough=passthrough)] if passthrough else []),
    ]


def _check_dtypes(source: HFCheckpointReader, family: Family) -> None:
    """Raise DataError if tensors that are fused into one have different dtypes, because one would be rounded."""
    first_parts: dict[str, tuple[torch.dtype, str]] = {}
    for name in family.mappings:
        for layer, expert in name.instances():
            key = checkpoint_slice(name, layer, expert, family).key
            for hf_name in name.hf_names(layer, expert):
                dtype = source.specs[hf_name].dtype
                first = first_parts.setdefault(key, (dtype, hf_name))
                if first[0] != dtype:
                    raise DataError(f"{first[1]} is {first[0]} and {hf_name} {dtype}; they become one tensor, {key}")


def _write_file(
    source: HFCheckpointReader, family: Family, contents: FileContents, file: str, output: BinaryIO, report: ProgressFn
) -> FileRecord:
    """Write one file; return its tensors and manifest entries."""
    digests: dict[str, hashlib._Hash] = {}
    keys = defaultdict[str, list[str]](list)
    tensors: dict[str, StoredTensor] = {}

    def update_digest(name: str, values: Tensor) -> None:
        digests.setdefault(name, hashlib.sha256()).update(values.flatten().view(torch.uint8).numpy().data)
        report(values.nbytes)

    reader = source.for_thread()
    reader.on_read = update_digest
    for name, layer, expert in contents.mapped:
        destination = checkpoint_slice(name, layer, expert, family)
        tensor = name.rule.shard([reader.read(hf_name) for hf_name in name.hf_names(layer, expert)], 0, 1)
        chunk = write_tensor(output, file, destination.start, tensor.view(destination.slice_shape))
        _add_chunk(tensors, destination.key, destination.stored_shape, tensor.dtype, chunk)
        for hf_name in name.hf_names(layer, expert):
            keys[source.tensors[hf_name].stored_name].append(destination.key)
    for hf_name in contents.passthrough:
        tensor = reader.read(hf_name)
        chunk = write_tensor(output, file, [0] * tensor.dim(), tensor)
        _add_chunk(tensors, PASSTHROUGH_PREFIX + hf_name, tuple(tensor.shape), tensor.dtype, chunk)
        keys[source.tensors[hf_name].stored_name].append(PASSTHROUGH_PREFIX + hf_name)
    entries = [
        ManifestEntry(
            name=name,
            file=source.stored[name].path.name,
            dtype=dtype_name(source.stored[name].dtype),
            shape=source.stored[name].shape,
            sha256=digest.hexdigest(),
            to=tuple(sorted(set(keys[name]))),
        )
        for name, digest in digests.items()
    ]
    written = {
        key: TensorChunks(shape=saved.shape, dtype=dtype_name(saved.dtype), chunks=saved.chunks)
        for key, saved in tensors.items()
    }
    return FileRecord(rows=tuple(entries), tensors=written)


def _add_chunk(
    tensors: dict[str, StoredTensor], key: str, shape: tuple[int, ...], dtype: torch.dtype, chunk: TensorChunk
) -> None:
    chunks = tensors[key].chunks if key in tensors else ()
    tensors[key] = StoredTensor(shape, dtype, (*chunks, chunk))


def _all_tensors(records: list[FileRecord]) -> dict[str, StoredTensor]:
    """Return where every tensor of the checkpoint is, from the records of all files."""
    tensors: dict[str, StoredTensor] = {}
    for record in records:
        for key, entry in record.tensors.items():
            for chunk in entry.chunks:
                _add_chunk(tensors, key, entry.shape, dtype_of(entry.dtype), chunk)
    return tensors
