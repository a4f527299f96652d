import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.errors import RolloutError
from megatron_rl.inference_server.tensor_payload import read_tensors
from megatron_rl.weights.checksum import SHA256, SHORT_SHA256, padded_sha256, sha256
from megatron_rl.weights.disk import DiskTransport
from megatron_rl.weights.flat_bucket import FlatBucket, TensorHeader
from megatron_rl.weights.shared_memory import Handle, MemoryLocation, TensorSlice
from megatron_rl.weights.tensor import TensorTransport
from megatron_rl.weights.transport import StreamResult, WeightReceiver, WeightTransport

TENSORS = [(f"t{i}", torch.randn(10, 10)) for i in range(7)]


class Recorder:
    """A server that remembers what was asked of it, and fails where it is told to."""

    def __init__(self, url: str, fails_at: str = "", algorithm: str = SHA256, damages: str = "") -> None:
        self.url, self.fails_at, self.algorithm, self.damages = url, fails_at, algorithm, damages
        self.calls: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.newest = "default"

    async def _called(self, name: str) -> None:
        await asyncio.sleep(0)
        self.calls.append(name)
        if name == self.fails_at:
            raise RolloutError(f"{self.url} fails at {name}")

    async def begin_update(self) -> None:
        await self._called("begin")

    async def update_from_tensor(self, payload: str) -> None:
        await self._called("bucket")
        self.tensors |= dict(read_tensors(payload))

    async def tensor_parallel(self) -> int:
        return 1

    async def join_group(self, host: str, port: int, size: int, name: str, backend: str, rank: int = 1) -> None:
        await self._called("join")

    async def update_from_distributed(
        self, tensors: Sequence[TensorHeader], group: str, *, is_flat: bool = False
    ) -> None:
        await self._called("bucket")

    async def receiver(self) -> WeightReceiver:
        return WeightReceiver(self.url, ranks=1, is_streamed=True)

    async def version(self) -> str:
        return self.newest

    async def update_from_stream(self, bucket: FlatBucket, chain: Sequence[str]) -> Mapping[str, StreamResult]:
        await self._called("bucket")
        self.tensors |= dict(bucket.tensors())
        return {self.url: StreamResult()}

    async def leave_group(self, name: str) -> None:
        await self._called("leave")

    async def end_update(self) -> None:
        await self._called("end")

    async def update_from_disk(self, folder: str) -> None:
        await self._called("disk")
        for file in sorted(Path(folder).glob("*.safetensors")):
            self.tensors |= load_file(file)

    async def set_version(self, version: str) -> None:
        await self._called(f"version {version}")
        self.newest = version

    async def memory_location(self) -> MemoryLocation | None:
        return None

    async def update_from_handle(self, handle: Handle, slices: Sequence[TensorSlice]) -> None:
        await self._called("bucket")

    async def checksums(self, algorithm: str = SHA256) -> tuple[str, Mapping[str, str]]:
        await self._called("checksums")
        sums = {name: sha256(tensor) for name, tensor in self.tensors.items()}
        if self.algorithm == SHORT_SHA256:  # as SGLang: some names are its own
            sums = {n: s[:16] for n, s in sums.items() if n != "t0"} | {"t0_fused": "0" * 16}
        return self.algorithm, {n: "damaged" if n == self.damages else s for n, s in sums.items()}


@pytest.fixture(params=["tensor", "disk"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> WeightTransport:
    if request.param == "tensor":
        return TensorTransport(bucket_bytes=1000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return DiskTransport(1000, tmp_path / "weights", tmp_path / "model")


def test_a_push_brings_every_tensor_and_then_the_version(transport: WeightTransport) -> None:
    servers = [Recorder("a"), Recorder("b")]
    report = asyncio.run(transport.push(servers, iter(TENSORS), 3))
    assert not report.failed
    assert (report.num_tensors, report.num_bytes, report.version) == (7, 2800, 3)
    for server in servers:
        assert all(torch.equal(server.tensors[name], tensor) for name, tensor in TENSORS)
        assert server.calls[-2:] == ["checksums", "version 3"]


def test_tensors_go_between_begin_and_end_in_buckets_of_the_stated_size() -> None:
    server = Recorder("a")
    asyncio.run(TensorTransport(bucket_bytes=1000).push([server], TENSORS, 1))
    assert server.calls == ["begin", *["bucket"] * 4, "end", "checksums", "version 1"]  # 2 x 400 bytes a bucket


def test_begin_is_awaited_on_all_before_any_tensor() -> None:
    order: list[str] = []

    class Slow(Recorder):
        async def begin_update(self) -> None:
            await asyncio.sleep(0.05)
            order.append("slow begins")

    class Fast(Recorder):
        async def update_from_tensor(self, payload: str) -> None:
            order.append("fast has a bucket")
            await super().update_from_tensor(payload)

    asyncio.run(TensorTransport(1 << 20).push([Fast("fast"), Slow("slow")], TENSORS, 1))
    assert order == ["slow begins", "fast has a bucket"]


@pytest.mark.parametrize("fails_at", ["begin", "bucket", "end", "checksums", "version 1"])
def test_a_server_that_fails_is_reported_and_the_others_go_on(fails_at: str) -> None:
    good, bad = Recorder("good"), Recorder("bad", fails_at)
    report = asyncio.run(TensorTransport(1000).push([bad, good], TENSORS, 1))
    assert report.failed.keys() == {"bad"}
    assert f"bad fails at {fails_at}" in str(report.failed["bad"])
    assert good.calls[-1] == "version 1"
    assert bad.calls[-1] == fails_at


def test_damaged_weights_are_found_and_never_get_the_version(transport: WeightTransport) -> None:
    good, bad = Recorder("good"), Recorder("bad", damages="t5")
    report = asyncio.run(transport.push([good, bad], TENSORS, 1))
    assert "1 of 7 tensors differ from what was sent, first 't5'" in str(report.failed["bad"])
    assert "version 1" not in bad.calls
    assert "version 1" in good.calls


def test_foreign_checksums_are_compared_among_the_servers(transport: WeightTransport) -> None:
    servers = [Recorder("a", algorithm=""), Recorder("b", algorithm=""), Recorder("c", algorithm="", damages="t1")]
    report = asyncio.run(transport.push(servers, TENSORS, 1))
    assert report.failed.keys() == {"c"}
    assert "differ from those of a" in str(report.failed["c"])


def test_short_checksums_are_compared_where_the_names_are_the_same(transport: WeightTransport) -> None:
    servers = [Recorder(url, algorithm=SHORT_SHA256, damages=damages) for url, damages in (("a", ""), ("b", "t1"))]
    report = asyncio.run(transport.push(servers, TENSORS, 1))
    assert report.failed.keys() == {"b"}
    assert "1 of 6 tensors differ" in str(report.failed["b"])


def test_rows_that_the_server_pads_with_are_allowed() -> None:
    table = torch.randn(50, 4)
    padded = torch.cat([table, torch.zeros(14, 4)])
    assert padded_sha256(table) == (sha256(table), sha256(padded))
    assert padded_sha256(padded) == (sha256(padded), sha256(padded))
    assert len(set(padded_sha256(torch.randn(5)))) == 1


def test_a_server_that_took_nothing_is_found(transport: WeightTransport) -> None:
    empty = Recorder("a", algorithm=SHORT_SHA256)
    report = asyncio.run(transport.push([empty], [("t0", torch.ones(3))], 1))
    assert "none of the 1 tensors that were sent" in str(report.failed["a"])


def test_disk_keeps_the_newest_versions_and_no_unfinished_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    transport = DiskTransport(1000, tmp_path / "weights", tmp_path, keep=2)
    for version in range(1, 5):
        asyncio.run(transport.push([Recorder("a")], TENSORS, version))
    assert sorted(p.name for p in transport.folder.iterdir()) == ["version-3", "version-4"]
    newest = sorted(p.name for p in (transport.folder / "version-4").iterdir())
    assert newest[:2] == ["config.json", "model-00000-00001.safetensors"]
    assert newest[-1] == "model.safetensors.index.json"


def test_parts_of_larger_tensors_arrive_as_they_are() -> None:
    server = Recorder("a")
    whole = torch.randn(20, 20)
    parts = [("sequences", whole[3:5]), ("columns", whole[:, 3:5]), ("turned", whole.T)]
    assert not asyncio.run(TensorTransport(1000).push([server], parts, 1)).failed
    assert all(torch.equal(server.tensors[name], tensor) for name, tensor in parts)
