"""Hugging Face -> megatron-core: each layer becomes a file of whole Megatron tensors, which serve every layout."""

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

from megatron_rl.convert.jobs import FileJob, ProgressFn, Staging, enough_room, run_jobs
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
from megatron_rl.models.torch_dist_reader import CARRIED, checkpoint_slice


@dataclass
class FileContents:
    """One layer, or what belongs to none: entries of the table, and tensors that go along."""

    entries: list[tuple[ParamMapping, int, int]] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)

    def hf_names(self) -> Iterator[str]:
        """Yield every Hugging Face tensor that it takes."""
        for name, layer, expert in self.entries:
            yield from name.hf_names(layer, expert)
        yield from self.carried


def convert(source_folder: Path, target: Path, threads: int, console: Console) -> Manifest:
    """Write ``target``, a distributed checkpoint with manifest, from a Hugging Face folder; return the manifest.

    Raises:
        ConfigError: a family that is not known, or a target that is there.
        DataError: a tensor is missing, extra, there twice or misshapen, or a file is damaged.
    """
    hf = read_hf_config(source_folder)
    family = family_of(hf)
    source = HFCheckpointReader(source_folder, family, hf)
    source.check(family)
    parts = _parts(source, family)
    _check_dtypes(source, family)
    files = {e.path.name: e.path.stat() for e in source.files.values()}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    jobs = []
    for number, part in enumerate(parts):
        size = sum(source.pieces[name].num_bytes for name in part.hf_names())
        file = f"__{number}_0.distcp"
        jobs.append(FileJob(file, size, partial(_convert_part, source, family, part, file)))
    staging = Staging(target, {"to": "megatron", "files": stamps})
    enough_room(target.parent, sum(spec.num_bytes for spec in source.specs.values()))
    records = run_jobs(staging, jobs, threads, console)
    write_metadata(staging.folder, _joined(records))
    copy_companions(source_folder, staging.folder)
    # In the order of the files, so that converting back can write them as they were.
    rows = sorted((row for record in records for row in record.rows), key=lambda row: _place_in_files(source, row))
    manifest = write_manifest(staging.folder, hf, rows, "hf-to-megatron", fp8_block=fp8_block(hf))
    staging.publish()
    return manifest


def _place_in_files(source: HFCheckpointReader, row: ManifestEntry) -> tuple[str, int]:
    """Return the file and the byte where a row's tensor begins."""
    extent = source.files[row.name]
    return extent.path.name, extent.offset


def _parts(source: HFCheckpointReader, family: Family) -> list[FileContents]:
    """Return the work: what belongs to no layer first, then each layer, then what only goes along."""
    ends, layers = FileContents(), defaultdict[int, FileContents](FileContents)
    for name in family.mappings:
        for layer, expert in name.instances():
            part = layers[layer] if "{layer}" in name.megatron else ends
            part.entries.append((name, layer, expert))
    along = [name for name in source.specs if source.is_passthrough(name, family)]
    return [ends, *(layers[layer] for layer in sorted(layers)), *([FileContents(carried=along)] if along else [])]


def _check_dtypes(source: HFCheckpointReader, family: Family) -> None:
    """Raise a DataError where tensors that become one have several dtypes: one of them would be rounded."""
    found: dict[str, tuple[torch.dtype, str]] = {}
    for name in family.mappings:
        for layer, expert in name.instances():
            key = checkpoint_slice(name, layer, expert, family).key
            for hf_name in name.hf_names(layer, expert):
                dtype = source.specs[hf_name].dtype
                first = found.setdefault(key, (dtype, hf_name))
                if first[0] != dtype:
                    raise DataError(f"{first[1]} is {first[0]} and {hf_name} {dtype}; they become one tensor, {key}")


def _convert_part(
    source: HFCheckpointReader, family: Family, part: FileContents, file: str, output: BinaryIO, report: ProgressFn
) -> FileRecord:
    """Write one file; return where each tensor is in it, and the rows of the manifest."""
    sums: dict[str, hashlib._Hash] = {}
    where = defaultdict[str, list[str]](list)
    tensors: dict[str, StoredTensor] = {}

    def watch(name: str, values: Tensor) -> None:
        sums.setdefault(name, hashlib.sha256()).update(values.flatten().view(torch.uint8).numpy().data)
        report(values.nbytes)

    reader = source.for_thread()
    reader.watch = watch
    for name, layer, expert in part.entries:
        place = checkpoint_slice(name, layer, expert, family)
        whole = name.rule.shard([reader.read(hf_name) for hf_name in name.hf_names(layer, expert)], 0, 1)
        chunk = write_tensor(output, file, place.start, whole.view(place.box))
        _add(tensors, place.key, place.full, whole.dtype, chunk)
        for hf_name in name.hf_names(layer, expert):
            where[source.pieces[hf_name].of].append(place.key)
    for hf_name in part.carried:
        tensor = reader.read(hf_name)
        chunk = write_tensor(output, file, [0] * tensor.dim(), tensor)
        _add(tensors, CARRIED + hf_name, tuple(tensor.shape), tensor.dtype, chunk)
        where[source.pieces[hf_name].of].append(CARRIED + hf_name)
    rows = [
        ManifestEntry(
            name=name,
            file=source.files[name].path.name,
            dtype=dtype_name(source.files[name].dtype),
            shape=source.files[name].shape,
            sha256=digest.hexdigest(),
            to=tuple(sorted(set(where[name]))),
        )
        for name, digest in sums.items()
    ]
    written = {
        key: TensorChunks(shape=saved.shape, dtype=dtype_name(saved.dtype), chunks=saved.chunks)
        for key, saved in tensors.items()
    }
    return FileRecord(rows=tuple(rows), tensors=written)


def _add(
    tensors: dict[str, StoredTensor], key: str, shape: tuple[int, ...], dtype: torch.dtype, chunk: TensorChunk
) -> None:
    chunks = tensors[key].chunks if key in tensors else ()
    tensors[key] = StoredTensor(shape, dtype, (*chunks, chunk))


def _joined(records: list[FileRecord]) -> dict[str, StoredTensor]:
    """Return where every tensor of the checkpoint is, from the records of all files."""
    tensors: dict[str, StoredTensor] = {}
    for record in records:
        for key, entry in record.tensors.items():
            for chunk in entry.chunks:
                _add(tensors, key, entry.shape, dtype_of(entry.dtype), chunk)
    return tensors
