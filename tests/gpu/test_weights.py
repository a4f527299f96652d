"""Tests of weights that pass between processes on one GPU; run like test_gpu.py."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import embedded_server
from megatron_rl.weights.checksum import sums64
from megatron_rl.weights.ipc import IpcTransport
from tests.gpu.test_gpu import DEVICE, REHEARSAL
from tests.inference_server import tiny
from tests.weights.test_distributed import healthy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="torch sees no CUDA device"),
]
HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Some attention kernels need heads wider than 8.
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param), head_dim=32)


@pytest.mark.parametrize("bucket_bytes", [1 << 12, 1 << 24])
def test_weights_reach_a_server_of_this_device(folder: Path, tmp_path: Path, bucket_bytes: int) -> None:
    process = embedded_server(str(folder), tmp_path / "log", environment={"MEGATRON_RL_DEVICE": DEVICE})
    process.start()
    try:
        asyncio.run(healthy([process]))
        for version in (1, 2):  # the second push uses memory that the first gave back
            weights = {n: (t * version).to(HERE) for n, t in load_file(folder / "model.safetensors").items()}
            found = asyncio.run(pushed(process.url, IpcTransport(bucket_bytes, HERE), weights, version))
            assert found == sums64(weights)
    finally:
        process.stop()


async def pushed(url: str, transport: IpcTransport, weights: dict[str, torch.Tensor], version: int) -> dict[str, str]:
    """Push the weights and return the checksums that the server reports afterwards."""
    client = Client(url)
    report = await transport.push([client], weights.items(), version)
    assert not report.failed, report.failed
    _, sums = await client.checksums("sum64")
    await client.close()
    return dict(sums)


def test_the_checksum_of_a_device_is_the_one_of_the_cpu() -> None:
    tensors = {"a": torch.randn(70_001, 9), "b": torch.randn(1 << 20).bfloat16(), "c": torch.randn(())}
    assert sums64({name: tensor.to(HERE) for name, tensor in tensors.items()}) == sums64(tensors)
