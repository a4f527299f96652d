"""Weights through a folder that the servers can see: safetensors files, complete before any server is told of them.

Every trainer rank writes the tensors that it speaks for, all at once; the main rank adds the index and the name.
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

from megatron_rl.weights.transport import NamedTensors, Server, UpdateReport, WeightTransport, WeightUpdate, sums_of

_CONFIG_FILES = ("config.json", "generation_config.json")
Gather = Callable[[object], list[object]]
"""A JSON value of every rank, in rank order; collective."""


@dataclass
class Share:
    """What one rank wrote: file -> names of its tensors, their checksums, their bytes."""

    files: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_bytes: int = 0


def write_bucket(folder: Path, rank: int, number: int, bucket: NamedTensors) -> dict[str, list[str]]:
    """Write a bucket as a file of its own; return its name and those of its tensors."""
    name = f"model-{rank:05d}-{number + 1:05d}.safetensors"
    save_file(dict(bucket), folder / name, {"format": "pt"})
    return {name: [tensor for tensor, _ in bucket]}


def unfinished(folder: Path, version: int) -> Path:
    """Return where the files of a version are while they are not all there."""
    return folder / f".version-{version}.unfinished"


def write_share(
    folder: Path, version: int, rank: int, buckets: Iterable[list[tuple[str, Tensor]]], gather: Gather
) -> None:
    """Write a rank's tensors while the main rank pushes the version; collective with it."""
    gather(None)  # until the main rank has made the folder
    share = Share()
    for bucket in buckets:
        share.files |= write_bucket(unfinished(folder, version), rank, len(share.files), bucket)
        share.sums |= sums_of(bucket)
        share.num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        bucket.clear()
    gather(asdict(share))


@dataclass
class DiskTransport(WeightTransport):
    """Writes ``folder/version-N`` and lets every server read it; keeps the newest ``keep`` versions."""

    bucket_bytes: int
    folder: Path
    model_path: Path
    """Where config.json comes from: SGLang wants a whole checkpoint folder."""
    keep: int = 2
    gather: Gather | None = None
    """With the ranks that are in ``write_share`` meanwhile; None: this process pushes all tensors."""
    newest: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Checksums of the newest version."""

    async def begin(self, servers: Sequence[Server], version: int) -> WeightUpdate:
        """Open a push; nothing is asked of a server before the files are complete."""
        push = _DiskUpdate(list(servers), version, carrier=self)
        shutil.rmtree(push.unfinished, ignore_errors=True)
        push.unfinished.mkdir(parents=True)
        return push

    def join(self, push: WeightUpdate) -> None:
        """See ``WeightTransport``: take what the other ranks wrote."""
        if self.gather is None:
            return
        assert isinstance(push, _DiskUpdate)
        for entry in self.gather(None)[1:]:
            push.add(Share(**cast(dict[str, Any], entry)))

    def open(self) -> None:
        """See ``WeightTransport``: let the other ranks begin to write."""
        if self.gather is not None:
            self.gather(None)

    async def repeat(self, servers: Sequence[Server], version: int) -> UpdateReport | None:
        """See ``WeightTransport``: the files are still there."""
        push = _DiskUpdate(list(servers), version, carrier=self, sums=dict(self.newest), finished=True)
        return await push.finish()

    def final(self, version: int) -> Path:
        """Return the folder of a complete version."""
        return self.folder / f"version-{version}"


@dataclass
class _DiskUpdate(WeightUpdate):
    carrier: DiskTransport = field(kw_only=True)
    share: Share = field(default_factory=Share)
    finished: bool = False
    """The files are complete: they only have to be read."""

    @property
    def unfinished(self) -> Path:
        return unfinished(self.carrier.folder, self.version)

    def add(self, other: Share) -> None:
        """Count another rank's files as part of this version."""
        self.share.files |= other.files
        self.sums |= {name: (sums[0], sums[1]) for name, sums in other.sums.items()}
        self.num_bytes += other.num_bytes

    async def _carry(self, bucket: NamedTensors) -> None:
        self.share.files |= await asyncio.to_thread(write_bucket, self.unfinished, 0, len(self.share.files), bucket)

    async def _end(self) -> None:
        final = self.carrier.final(self.version)
        if not self.finished:
            self._complete(final)
        await self.each(lambda server: server.update_from_disk(str(final.resolve())))

    def _complete(self, final: Path) -> None:
        for name in _CONFIG_FILES:
            if (self.carrier.model_path / name).is_file():
                shutil.copy(self.carrier.model_path / name, self.unfinished / name)
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {t: f for f, ts in self.share.files.items() for t in ts},
        }
        (self.unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.rmtree(final, ignore_errors=True)
        self.unfinished.rename(final)
        self.carrier.newest = self.sums
        for old in self._folders()[: -self.carrier.keep]:
            shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        found = [p for p in self.carrier.folder.glob("version-*") if p.name.removeprefix("version-").isdigit()]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)
