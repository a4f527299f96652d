"""Weights through a folder that the servers can see: safetensors files, complete before any server is told of them."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file

from megatron_rl.weights.protocol import Carrier, NamedTensors, Push, Server

_CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass
class DiskCarrier(Carrier):
    """Writes ``folder/version-N`` and lets every server read it; keeps the newest ``keep`` versions."""

    bucket_bytes: int
    folder: Path
    model_path: Path
    """Where config.json comes from: SGLang wants a whole checkpoint folder."""
    keep: int = 2

    async def begin(self, servers: Sequence[Server], version: int) -> Push:
        """Open a push; nothing is asked of a server before the files are complete."""
        return _DiskPush(list(servers), version, carrier=self)


@dataclass
class _DiskPush(Push):
    carrier: DiskCarrier = field(kw_only=True)
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def unfinished(self) -> Path:
        return self.carrier.folder / f".version-{self.version}.unfinished"

    async def _carry(self, bucket: NamedTensors) -> None:
        name = f"model-{len(self.files) + 1:05d}.safetensors"
        if not self.files:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(parents=True)
        await asyncio.to_thread(save_file, dict(bucket), self.unfinished / name, {"format": "pt"})
        self.files[name] = [tensor for tensor, _ in bucket]

    async def _end(self) -> None:
        for name in _CONFIG_FILES:
            if (self.carrier.model_path / name).is_file():
                shutil.copy(self.carrier.model_path / name, self.unfinished / name)
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": {t: f for f, ts in self.files.items() for t in ts},
        }
        (self.unfinished / "model.safetensors.index.json").write_text(json.dumps(index))
        final = self.carrier.folder / f"version-{self.version}"
        shutil.rmtree(final, ignore_errors=True)
        self.unfinished.rename(final)
        await self.each(lambda server: server.update_from_disk(str(final.resolve())))
        for old in self._folders()[: -self.carrier.keep]:
            shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        found = [p for p in self.carrier.folder.glob("version-*") if p.name.removeprefix("version-").isdigit()]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)
