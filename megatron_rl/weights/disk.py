"""Weights through a folder that trainer and servers share, as safetensors files; servers read complete versions only.

Every trainer rank writes the tensors it owns, all ranks in parallel; the main rank adds the index and renames the
folder.
"""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.weights.transport import (
    NamedTensors,
    UpdateReport,
    WeightServer,
    WeightTransport,
    WeightUpdate,
    bucket_checksums,
)

_CONFIG_FILES = ("config.json", "generation_config.json")
Gather = Callable[[object], list[object]]
"""Collective: returns the JSON value of every rank, in rank order."""


@dataclass
class RankFiles:
    """The files that one rank wrote: file name -> tensor names, the tensors' checksums, and the bytes."""

    files: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_bytes: int = 0


def write_bucket(folder: Path, rank: int, number: int, bucket: NamedTensors) -> dict[str, list[str]]:
    """Write a bucket to its file; return the file's name with the names of its tensors."""
    name = f"model-{rank:05d}-{number + 1:05d}.safetensors"
    save_file(dict(bucket), folder / name, {"format": "pt"})
    return {name: [tensor for tensor, _ in bucket]}


def unfinished_folder(folder: Path, version: int) -> Path:
    """Return the folder of a version's files until the version is complete."""
    return folder / f".version-{version}.unfinished"


def write_rank_files(
    folder: Path, version: int, rank: int, buckets: Iterable[list[tuple[str, Tensor]]], gather: Gather
) -> None:
    """Write the tensors of a rank other than the main one; collective with the main rank's update of the version."""
    gather(None)  # wait until the main rank has made the folder
    written = RankFiles()
    for bucket in buckets:
        written.files |= write_bucket(unfinished_folder(folder, version), rank, len(written.files), bucket)
        written.sums |= bucket_checksums(bucket)
        written.num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        bucket.clear()
    gather(asdict(written))


@dataclass
class DiskTransport(WeightTransport):
    """Writes ``folder/version-N``, which every server reads; keeps the newest ``keep`` versions."""

    bucket_bytes: int
    folder: Path
    model_path: Path
    """The folder from which config.json is copied: SGLang needs a whole checkpoint folder."""
    keep: int = 2
    gather: Gather | None = None
    """Collective with the ranks that run ``write_rank_files``; None if this process sends all tensors."""
    newest_sums: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Checksums of the newest version."""

    async def begin(self, servers: Sequence[WeightServer], version: int) -> WeightUpdate:
        """Open an update; servers are not called before the files are complete."""
        update = _DiskUpdate(list(servers), version, transport=self)
        shutil.rmtree(update.unfinished, ignore_errors=True)
        update.unfinished.mkdir(parents=True)
        return update

    def open(self) -> None:
        """Let the other ranks begin to write; collective."""
        if self.gather is not None:
            self.gather(None)

    def join(self, update: WeightUpdate) -> None:
        """Add the files that the other ranks wrote; collective."""
        if self.gather is None:
            return
        assert isinstance(update, _DiskUpdate)
        for entry in self.gather(None)[1:]:
            update.add(RankFiles(**cast(dict[str, Any], entry)))

    async def resend(self, servers: Sequence[WeightServer], version: int) -> UpdateReport | None:
        """Make more servers read the files of the newest version."""
        update = _DiskUpdate(list(servers), version, transport=self, sums=dict(self.newest_sums), is_complete=True)
        return await update.finish()

    def version_folder(self, version: int) -> Path:
        """Return the folder of a complete version."""
        return self.folder / f"version-{version}"


@dataclass
class _DiskUpdate(WeightUpdate):
    transport: DiskTransport = field(kw_only=True)
    written: RankFiles = field(default_factory=RankFiles)
    is_complete: bool = False
    """All files exist: servers only have to read them."""

    @property
    def unfinished(self) -> Path:
        return unfinished_folder(self.transport.folder, self.version)

    def add(self, other: RankFiles) -> None:
        """Add another rank's files to this version."""
        self.written.files |= other.files
        self.sums |= {name: (sums[0], sums[1]) for name, sums in other.sums.items()}
        self.num_bytes += other.num_bytes

    async def _send(self, bucket: NamedTensors) -> None:
        number = len(self.written.files)
        self.written.files |= await asyncio.to_thread(write_bucket, self.unfinished, 0, number, bucket)

    async def _apply(self) -> None:
        folder = self.transport.version_folder(self.version)
        if not self.is_complete:
            self._complete(folder)
        await self.for_each_server(lambda server: server.update_from_disk(str(folder.resolve())))

    def _complete(self, folder: Path) -> None:
        for name in _CONFIG_FILES:
            if (self.transport.model_path / name).is_file():
                shutil.copy(self.transport.model_path / name, self.unfinished / name)
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {t: f for f, ts in self.written.files.items() for t in ts},
        }
        (self.unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.rmtree(folder, ignore_errors=True)
        self.unfinished.rename(folder)
        self.transport.newest_sums = self.sums
        for old in self._version_folders()[: -self.transport.keep]:
            shutil.rmtree(old)

    def _version_folders(self) -> list[Path]:
        found = [p for p in self.transport.folder.glob("version-*") if p.name.removeprefix("version-").isdigit()]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)
