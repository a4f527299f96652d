"""The embedded engine on a GPU: graphs give what steps give, also after new weights; weights pass between processes.

Written without a GPU, see test_gpu.py, whose rules hold here too.
"""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.fleet.client import Client
from megatron_rl.fleet.process import embedded_server
from megatron_rl.inference_server.engine import Engine
from megatron_rl.inference_server.model import ServedModel
from megatron_rl.inference_server.requests import Row
from megatron_rl.inference_server.slots import Kind
from megatron_rl.inference_server.static import StaticDecoder
from megatron_rl.ops.graphs import Graphs
from megatron_rl.weights.checksum import sums64
from megatron_rl.weights.ipc import IpcTransport
from tests.gpu.test_gpu import DEVICE, REHEARSED, gpu_only
from tests.inference_server import tiny
from tests.inference_server.tiny import finished, prompts_of, work_of
from tests.weights.test_distributed import healthy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="torch sees no CUDA device"),
]
HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads of 8 are too narrow for some kernels of attention.
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param), head_dim=32)


def answers(folder: Path, dtype: str, way: str) -> list[Row]:
    """Return rows of two requests, between which all weights change."""
    model = ServedModel(str(folder), dtype, "0", HERE)
    graphs = Graphs(HERE, way == "graphs")
    static = StaticDecoder(model.model, model.routes, graphs) if way != "growing" else None
    engine = Engine(model, static=static)
    engine.start()
    rows: list[Row] = []
    ways = [{"temperature": 0.7}, {"top_k": 5}, {}, {"stop_token_ids": [3, 11, 30]}]
    params = [{"max_new_tokens": 4 + 9 * i, "sampling_seed": i, **ways[i % 4]} for i in range(9)]
    try:
        for factor in (1.0, 1.25):
            engine.call(lambda factor=factor: [t.mul_(factor) for t in model.tensors.values()]).result()
            rows += finished(engine, work_of(prompts_of(*range(2, 20, 2)), params))[0]
    finally:
        engine.close()
    if way == "graphs" and not REHEARSED:
        assert graphs.capturing  # no step fell back to single launches
    return rows


@pytest.mark.parametrize("way", ["slots", "graphs"])
def test_every_way_of_decoding_gives_the_same_tokens(folder: Path, way: str) -> None:
    expected, found = answers(folder, "float32", "growing"), answers(folder, "float32", way)
    assert [row.output_ids for row in found] == [row.output_ids for row in expected]
    for row, other in zip(found, expected, strict=True):
        # float32: other kernels, other orders of sums
        torch.testing.assert_close(torch.tensor(row.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


def test_a_graph_has_the_bits_of_its_step(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        step, graph = (answers(folder, dtype, way) for way in ("slots", "graphs"))
        assert [(row.output_ids, row.logprobs) for row in graph] == [(row.output_ids, row.logprobs) for row in step]


@gpu_only
def test_a_step_waits_for_nothing(folder: Path) -> None:
    model = ServedModel(str(folder), "bfloat16", "0", HERE)
    static = StaticDecoder(model.model, model.routes, Graphs(HERE, wanted=False))
    engine = Engine(model, static=static)
    engine.start()
    run = StaticDecoder.run

    def strict(decoder: StaticDecoder, kind: Kind) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(decoder, kind)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StaticDecoder, "run", strict)
            [rows] = finished(engine, work_of(prompts_of(3, 9, 4), [{"max_new_tokens": 20}] * 3))
    finally:
        engine.close()
    assert [len(row.output_ids) for row in rows] == [20] * 3


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


async def pushed(url: str, carrier: IpcTransport, weights: dict[str, torch.Tensor], version: int) -> dict[str, str]:
    """Push; return the checksums that the server has then."""
    client = Client(url)
    report = await carrier.push([client], weights.items(), version)
    assert not report.failed, report.failed
    _, sums = await client.checksums("sum64")
    await client.close()
    return dict(sums)


def test_the_checksum_of_a_device_is_the_one_of_the_cpu() -> None:
    tensors = {"a": torch.randn(70_001, 9), "b": torch.randn(1 << 20).bfloat16(), "c": torch.randn(())}
    assert sums64({name: tensor.to(HERE) for name, tensor in tensors.items()}) == sums64(tensors)
